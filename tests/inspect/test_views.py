"""What student and teacher see, drawn from the very views of training."""

from xml.etree import ElementTree

import pytest
import torch
from support import RECIPE_NAMES, resolved

from selfalign.errors import UserError
from selfalign.inspect.views import COLOURS, HIGHEST, LOWEST, NOT_SEEN, draw_diagram, see_views
from selfalign.randomness import make_generator

HREF = "{http://www.w3.org/1999/xlink}href"
IMAGE = torch.randn(1, 8, 8, generator=make_generator(0, "image")).clamp(-1, 1)


def see(name: str, **overrides: object):
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    return see_views(resolved(name, {"model.size": "tiny/2", **settings}), IMAGE)


def test_tokens_attend_within_their_group_where_attention_is_separated() -> None:
    (seen,) = see("sra-dts-as")
    groups = seen.student.groups
    assert groups.bincount().tolist() == [4, 12]
    assert torch.equal(seen.student.attends, groups[:, None] == groups)
    assert torch.equal(seen.teacher.attends, seen.student.attends)
    assert seen.student.timesteps == pytest.approx((HIGHEST, LOWEST))
    assert all(t <= s for t, s in zip(seen.teacher.timesteps, seen.student.timesteps, strict=True))


def test_noise_follows_each_tokens_timestep_in_image_order() -> None:
    """With no noise to speak of in one group, its pixels are the image's own."""
    (seen,) = see("sra-dts", flow__path="linear")
    change = (seen.student.image.float() - seen.clean.float()).abs()
    by_token = change[0].reshape(4, 2, 4, 2).mean(dim=(1, 3)).flatten()
    assert (
        by_token[seen.student.groups == 0].mean() > 1.5 * by_token[seen.student.groups == 1].mean()
    )


def test_one_group_and_no_teacher() -> None:
    (seen,) = see("sit")
    assert seen.teacher is None and not seen.student.groups.any() and seen.student.attends.all()
    assert len(seen.student.timesteps) == 1
    (seen,) = see("self-flow")
    assert seen.teacher.timesteps == pytest.approx((LOWEST,)) and not seen.teacher.groups.any()


def test_whole_images_stand_beside_the_others() -> None:
    whole, other = see("sra-dts-as", views__whole_image_fraction=0.25)
    assert whole.whole and not other.whole
    assert whole.student.attends.all() and not other.student.attends.all()
    assert whole.student.timesteps == pytest.approx((LOWEST,))


@pytest.mark.parametrize("ratios", [(0.25, 0.5, 0.25), (0.5, 0.5)], ids=str)
@pytest.mark.parametrize("name", ["sra-dts-as", "sra-dts", "self-flow", "sit"])
def test_tokens_that_are_dropped_are_left_out(name: str, ratios: tuple[float, ...]) -> None:
    (seen,) = see(name, views__mask_ratios=ratios, views__hidden_groups=1)
    groups, kept = seen.student.groups, len(ratios) - 1
    dropped = groups == NOT_SEEN
    assert int(dropped.sum()) == round(16 * ratios[-1])
    assert groups[~dropped].bincount().tolist() == [round(16 * r) for r in ratios[:-1]]
    assert not seen.student.attends[dropped].any() and not seen.student.attends[:, dropped].any()
    together = kept == 1 or name != "sra-dts-as"
    assert seen.student.whole == together and len(seen.student.timesteps) == kept
    by_token = seen.student.image[0].reshape(4, 2, 4, 2).permute(0, 2, 1, 3).flatten(0, 1)
    assert (by_token[dropped] == 128).all() and (by_token[~dropped] != 128).any()
    assert ElementTree.fromstring(draw_diagram(seen, "dropped")) is not None


def test_all_variants_show_the_same_noise() -> None:
    single = [see(name)[0].student.image for name in ("sit", "sra", "sra-as")]
    assert all(torch.equal(image, single[0]) for image in single)


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_diagram_is_a_picture_of_its_own(name: str) -> None:
    for seen in see(name):
        root = ElementTree.fromstring(draw_diagram(seen, "what <it> sees"))
        assert root.get("aria-label") == "what <it> sees"
        pictures = [e for e in root.iter() if e.tag.endswith("image")]
        assert all(picture.get(HREF).startswith("data:image/png") for picture in pictures)
        assert len(pictures) >= 4
        assert (COLOURS[1] in ElementTree.tostring(root, "unicode")) == (name not in ("sit", "sra"))


def test_latents_without_their_decoder_are_shown_as_they_are() -> None:
    def decode(images: torch.Tensor) -> torch.Tensor:
        raise UserError("no decoder")

    config = resolved("sra", {"model.size": "tiny/2"}, channels=4)
    (seen,) = see_views(config, torch.randn(4, 8, 8), decode)
    assert seen.clean.shape == (3, 8, 8) and seen.student.image.dtype == torch.uint8
