"""A Mixture-of-Experts layer on the ``cggr::moe`` operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import cggr_compile.ops  # noqa: F401  (registers)
from cggr_compile.ops.moe import moe_mlp
from cggr_compile.ops.moe_routing import moe_permute, moe_top_experts

METRICS = ("router_entropy", "top_expert_load", "aux_loss")


class PersistentTRMLP(nn.Module):
    """Token-routed SwiGLU experts: a router picks ``top_k`` of ``num_experts`` for every token.

    ``output, aux_loss = layer(hidden_states, mask=None)``. With router probabilities p(t) = softmax(W x_t), the best
    experts e_1 .. e_k of token t, and SwiGLU experts (Shazeer, arXiv 2002.05202),

        output_t = sum_j w_j * down[e_j] (silu(gate[e_j] x_t) * (up[e_j] x_t)),    w_j = p_{e_j} / sum_i p_{e_i}

    (for k = 1, w = p, or the router would learn nothing from the output: Switch, arXiv 2101.03961). Nothing waits for
    the device, and shapes do not depend on the routing.

    ``aux_loss`` is to be added to the training loss: ``aux_loss_weight`` * L_balance + ``z_loss_weight`` * L_z with

        L_balance = E * sum_e f_e P_e      f_e: share of all T * k assignments that expert e gets (no gradient),
                                           P_e: mean of p_e(t) over the T tokens;
        L_z       = mean over tokens of logsumexp(W x_t)^2.

    L_balance is equation 4 of Switch (arXiv 2101.03961), which follows GShard (arXiv 2006.16668), over all top-k
    assignments instead of the first; it is 1 when experts are used evenly. L_z is equation 5 of ST-MoE
    (arXiv 2202.08906).

    Args:
        hidden_dim: H, features of a token.
        intermediate_dim: I, features inside an expert.
        num_experts: E.
        top_k: experts per token, 1 to E.
        aux_loss_weight: factor of L_balance, 0.01 as in Switch.
        z_loss_weight: factor of L_z, 0 for none (ST-MoE uses 0.001).
        device: of the parameters: ``router`` [E, H], ``gate_up_proj`` [E, 2 I, H] (the gate's rows first),
            ``down_proj`` [E, H, I], the layout of transformers' experts.
        dtype: of the parameters.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        hidden_dim: int,
        intermediate_dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        aux_loss_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"hidden_dim": hidden_dim, "intermediate_dim": intermediate_dim, "num_experts": num_experts}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be in [1, num_experts = {num_experts}], got {top_k}")
        for name, weight in {"aux_loss_weight": aux_loss_weight, "z_loss_weight": z_loss_weight}.items():
            if not 0.0 <= weight < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {weight}")
        self.hidden_dim, self.intermediate_dim = hidden_dim, intermediate_dim
        self.num_experts, self.top_k = num_experts, top_k
        self.aux_loss_weight, self.z_loss_weight = aux_loss_weight, z_loss_weight
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = nn.Parameter(torch.empty(num_experts, hidden_dim, **factory))
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_dim, hidden_dim, **factory))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, intermediate_dim, **factory))
        self._metrics: Tensor
        self.register_buffer("_metrics", torch.zeros(len(METRICS), device=device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear`` draws its weights, expert by expert."""
        for parameter in (self.router, self.gate_up_proj, self.down_proj):
            bound = parameter.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route the tokens through their experts.

        Args:
            hidden_states: [..., H], usually [B, S, H], of the parameters' dtype (under autocast, any).
            mask: bool [...], such as the mask of a ``CGGRScorer``: False routes a token to no expert. Its output is
                zero, so that in a residual block it passes unchanged, and it counts in no loss. None: all tokens.

        Returns:
            output: as hidden_states. aux_loss: float32 scalar, differentiable in the router.

        Raises:
            ValueError: naming the argument of the wrong shape or dtype.
        """
        if hidden_states.shape[-1] != self.hidden_dim:
            raise ValueError(
                f"hidden_states must be [..., {self.hidden_dim}], got the shape {tuple(hidden_states.shape)}"
            )
        if mask is not None and (mask.shape != hidden_states.shape[:-1] or mask.dtype != torch.bool):
            wanted = tuple(hidden_states.shape[:-1])
            raise ValueError(f"mask must be bool {wanted}, got {mask.dtype} {tuple(mask.shape)}")
        tokens, gate_up, down = _for_products(hidden_states.flatten(0, -2), self.gate_up_proj, self.down_proj)
        if tokens.dtype != gate_up.dtype:
            raise ValueError(f"hidden_states must have the parameters' dtype {gate_up.dtype}, got {tokens.dtype}")
        logits = nn.functional.linear(tokens, self.router.to(tokens.dtype)).float()
        probabilities = logits.softmax(-1)
        experts = moe_top_experts(probabilities.detach(), self.top_k)
        weights = probabilities.gather(1, experts)
        if self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        routed = None if mask is None else mask.reshape(-1)
        if routed is not None:
            experts = torch.where(routed[:, None], experts, self.num_experts)
        order, position, offsets = moe_permute(experts, self.num_experts)
        save = torch.is_grad_enabled()
        output = moe_mlp(tokens, gate_up, down, weights, order, position, offsets, save)[0]
        return output.view(hidden_states.shape), self._balance(logits, probabilities, offsets, routed)

    def _balance(self, logits: Tensor, probabilities: Tensor, offsets: Tensor, routed: Tensor | None) -> Tensor:
        """The auxiliary loss; metrics on the side."""
        share = torch.ones_like(logits[:, 0]) if routed is None else routed.float()
        share = share / share.sum().clamp(min=1.0)  # of a token in the mean over tokens
        load = offsets.diff() / offsets[-1].clamp(min=1)
        balance = self.num_experts * (load * (share @ probabilities)).sum()
        aux_loss = self.aux_loss_weight * balance
        if self.z_loss_weight:
            aux_loss = aux_loss + self.z_loss_weight * (share @ logits.logsumexp(-1).square())
        with torch.no_grad():
            entropy = share @ torch.special.entr(probabilities).sum(-1)
            self._metrics.copy_(torch.stack([entropy, load.max(), aux_loss.detach()]))
        return aux_loss

    def metrics(self) -> dict[str, float]:
        """Of the last forward; reading them waits for the device.

        Returns:
            router_entropy: mean entropy of a token's router distribution, in nats, at most log E.
            top_expert_load: share of all assignments that went to the busiest expert; 1 / E when even.
            aux_loss: what the forward returned.
        """
        return dict(zip(METRICS, self._metrics.tolist(), strict=True))

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_dim}, {self.intermediate_dim}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"aux_loss_weight={self.aux_loss_weight}, z_loss_weight={self.z_loss_weight}"
        )


def _for_products(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, in its dtype: operators of our own are not on its list."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def create_persistent_tr_mlp(
    hidden_dim: int, intermediate_dim: int, num_experts: int, top_k: int = 2, **options: Any
) -> PersistentTRMLP:
    """A :class:`PersistentTRMLP`, whose other arguments ``options`` are."""
    return PersistentTRMLP(hidden_dim, intermediate_dim, num_experts, top_k, **options)
