"""Private names of PyTorch, and branches on its version, are in ``cggr_compile/compat`` only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import cggr_compile
from cggr_compile import compat

ROOT = Path(cggr_compile.__file__).parent
PRIVATE = re.compile(r"_(?!_)\w+")
PRIVATE_MODULE = re.compile(r"(torch|functorch)(\.\w+)*\.(_(?!_)\w+|experimental)(\.\w+)*|functorch(\.\w+)*")
# registered operators have such names, and so do functions that PyTorch and Python document
PUBLIC = re.compile(r"(torch\.ops|aten|prims)\..+|torch\._foreach_\w+|sys\._getframe")
OTHER_LIBRARIES = {
    *("_attn_implementation", "_supports_sdpa", "_require_grads_hooks", "_gradient_checkpointing_func"),  # transformers
    *("_can_record_outputs", "_output_capturing_hooks_installed", "_is_expert_parallel"),  # transformers
    *("_cache_clear", "_dora_cache"),  # PEFT
}


def sources():
    paths = {*ROOT.rglob("*.py"), *(ROOT / "passes").rglob("*.py")}  # rglob does not enter a symbolic link
    return sorted(path for path in paths if "compat" not in path.relative_to(ROOT).parts)


def private_names(text):
    """What a source text may not use: (line, name) pairs."""
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= OTHER_LIBRARIES | {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    found = []
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        elif isinstance(node, ast.Attribute):
            foreign = PRIVATE.fullmatch(node.attr) and node.attr not in own
            names = [ast.unparse(node)] if foreign or ast.unparse(node).startswith("torch") else []
            if foreign and not PUBLIC.fullmatch(names[0]):
                found.append((node.lineno, names[0]))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            of, name, *_ = node.args
            known = isinstance(name, ast.Constant) and str(name.value) not in own
            of_torch = ast.unparse(of).partition(".")[0] == "torch" and ast.unparse(node.func) != "setattr"
            if known and (of_torch or PRIVATE.fullmatch(name.value)):
                found.append((node.lineno, ast.unparse(node)))
            continue
        else:
            continue
        found += [
            (node.lineno, name)
            for name in names
            if (PRIVATE_MODULE.fullmatch(name) and not PUBLIC.fullmatch(name))
            or name in ("torch.__version__", "torch.version")
        ]
    return sorted(set(found))


def test_private_names_are_in_compat():
    paths = sources()
    assert len(paths) > 120 and ROOT / "passes" / "fx.py" in paths and ROOT / "backend.py" in paths
    found = [f"{path.relative_to(ROOT)}:{at}: {name}" for path in paths for at, name in private_names(path.read_text())]
    assert not found, found


def test_compat_has_them():
    texts = [path.read_text() for path in (ROOT / "compat").glob("*.py")]
    assert sum(bool(private_names(text)) for text in texts) > 15


def test_everything_that_compat_offers_is_used():
    checkout = (ROOT.parent / name for name in ("tests", "examples", "benchmarks"))
    texts = [path.read_text() for path in (*sources(), *(p for folder in checkout for p in folder.rglob("*.py")))]
    used = {name for text in texts for name in re.findall(r"\bcompat\.(\w+)", text)}
    used |= {name for text in texts for names in re.findall(r"from cggr_compile\.compat import (.+)", text)
             for name in names.split(", ")}  # fmt: skip
    tree = ast.parse((ROOT / "compat" / "__init__.py").read_text())
    offered = {a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names} - {"annotations"}
    assert len(offered) > 70 and offered <= set(vars(compat)) and offered <= used, offered - used


@pytest.mark.parametrize(
    "text",
    [
        "import torch._inductor",
        "from torch._ops import OpOverload",
        "from torch import _guards",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "from torch.utils.checkpoint import _checkpoint_hook",
        "def f():\n    from functorch.compile import make_boxed_func",
        "def f(op: torch._ops.OpOverload): ...",
        "torch._dynamo.config.recompile_limit",
        "torch.cuda._lazy_init()",
        "F._stacklevel",
        "node._dynamo_source = None",
        "getattr(node, '_dynamo_source', None)",
        "'torch._inductor.cudagraph_trees' in sys.modules",
        "torch.__version__ >= '2.13'",
        "torch.version.hip",
        "hasattr(torch.Tensor, 'swiglu')",
        "getattr(torch.nn, 'RMSNorm', None)",
    ],
)
def test_the_check_can_fail(text):
    assert private_names(text)


def test_what_is_no_private_name():
    text = """
        import torch.nn.functional as F
        from torch.fx.node import map_arg
        class A:
            def __init__(self, other):
                self._kept = other._kept
                torch.ops.aten._softmax, aten._to_copy, torch._foreach_copy_([], [])
                getattr(torch.Tensor, name), hasattr(node, "meta"), torch.nn.Module.__init__
                raise ValueError("set torch._dynamo.config.optimize_ddp = False")
    """
    assert private_names(text.replace("\n        ", "\n")) == []
