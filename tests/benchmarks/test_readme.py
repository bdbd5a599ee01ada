"""The README's code runs as it stands there, and its figures are those of the committed CSV."""

import json
import re
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from benchmarks.harness import table
from benchmarks.report import summary
from benchmarks.suites import catalog

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
TEST_COMMAND = (
    "python -m venv .venv && . .venv/bin/activate && pip install -e '.[test]' "
    "&& pytest -n 2 --dist worksteal && pytest tests/emulation/interpreter && pytest tests/emulation/host_cuda"
)


@pytest.fixture
def names(tmp_path: Path) -> dict[str, object]:
    """Returns what the README takes as given: a model of transformers, a directory that holds it, and documents."""
    torch.manual_seed(0)
    letters = [
        *["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    ]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = transformers.LEDConfig(
        vocab_size=len(vocabulary), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, attention_window=8,
        max_encoder_position_embeddings=64, max_decoder_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LEDForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    input_ids = torch.arange(4, 44)[None]
    global_attention_mask = (input_ids == 4).long()
    return {
        "model": model, "directory": tmp_path, "input_ids": input_ids,
        "global_attention_mask": global_attention_mask, "documents": ["A short one.", "A somewhat longer one."],
        "pairs": [("A short one.", "Short."), ("A somewhat longer one.", "Longer.")], "output": tmp_path / "tuned",
    }  # fmt: skip


def test_python_blocks_run(names: dict[str, object]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) >= 4
    stock = names["model"]
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "led_kernels" in type(stock.led.encoder).__module__
    assert len(names["summaries"]) == 2


def test_continuous_integration_finds_the_test_command() -> None:
    found = re.search(r"^<!-- tests -->\n```\w*\n(.*?)\n```$", TEXT, flags=re.DOTALL | re.MULTILINE)
    assert found
    assert found.group(1) == TEST_COMMAND


def section(title: str) -> str:
    return re.search(rf"^### {title}\n(.*?)^##", TEXT, flags=re.DOTALL | re.MULTILINE)[1]


def test_the_map_names_what_is_there() -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", section("Where things are"), flags=re.MULTILINE)
    assert len(rows) > 10
    for places, about in rows:
        first, *others = re.findall(r"`([\w/.]+)`", places)
        folder = ROOT / first if first.endswith("/") else (ROOT / first).parent
        named = [
            ROOT / first,
            *(folder / other if other.count("/") == 0 else ROOT / other for other in others),
        ]
        named += [folder / name for name in re.findall(r"`(\w+(?:/|\.py))`", about)]
        named += [ROOT / name for name in re.findall(r"`([\w/]+/\w+\.\w+)`", about)]
        for path in named:
            assert path.exists(), f"{path} of the row {places}"


def test_every_environment_variable_is_in_the_table() -> None:
    """All but what tests set for each other, and macros of the compiler."""
    others = {"LED_KERNELS_WITH_CUDA"}
    sources = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.py"), ROOT / "tests" / "skips.py"]
    sources += [path for package in ("led_kernels", "led_model") for path in (ROOT / package).rglob("*.py")]
    used = {
        name for path in sources for name in re.findall(r"\bLED_KERNELS_[A-Z_]+", path.read_text("utf-8"))
    }
    told = set(
        re.findall(r"^\| `(LED_KERNELS_\w+)` \|", section("Environment variables"), flags=re.MULTILINE)
    )
    assert told == used - others


def block_of(name: str) -> str:
    begin, end = summary.marks(name)
    return TEXT.partition(begin)[2].partition(end)[0].strip()


def test_figures_are_those_of_the_committed_runs() -> None:
    assert block_of(summary.FIGURES) == summary.readme_block(catalog.COMMITTED)


@pytest.mark.parametrize("name", summary.UNTIMED)
def test_tables_of_what_is_not_timed_are_those_of_the_committed_runs(name: str) -> None:
    suite = summary.UNTIMED[name]
    assert block_of(name) == suite.markdown(table.read(suite.DEFAULT, suite.Row))


def test_pictures_are_there_when_the_run_is() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", TEXT)
    assert pictures[0] == "benchmarks/results/pattern.png"
    for path in pictures if catalog.CPU.exists() else pictures[:1]:
        assert (ROOT / path).exists(), path


def test_pictures_are_followed_by_their_command() -> None:
    """Pictures may stand together; the first words after them say how they are drawn."""
    after = re.findall(r"(?:^!\[.*\]\(.*\)\n)+\n?(.*)$", TEXT, flags=re.MULTILINE)
    assert len(after) >= 2
    for line in after:
        assert re.match(r"Drawn by `python -m [\w.]+`", line), line
