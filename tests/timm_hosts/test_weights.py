"""timm's own DINOv2 takes the default vision model's weights and computes the same features."""

from pathlib import Path

import pytest
import torch

from fewer.vision import load_vision, timm_weights

timm = pytest.importorskip("timm", reason="timm is not installed here: make test-timm runs these")


@pytest.mark.slow
def test_timm_sees_what_transformers_sees(default_vision_model_path: Path) -> None:
    """At 518 pixels alone: for other sizes timm scales the position embeddings with antialiasing, transformers without,
    and at 224 features (of deviation 2.4) differ by up to 0.4."""
    theirs = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True).eval()
    theirs.load_state_dict(timm_weights())
    model, _ = load_vision()
    image = torch.randn(1, 3, 518, 518)
    with torch.inference_mode():
        torch.testing.assert_close(theirs.forward_features(image), model(image).last_hidden_state, atol=1e-4, rtol=0)
