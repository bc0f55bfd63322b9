"""Projectors: shapes, released names, and a convolution that does not care for the groups' order."""

import pytest
import torch
from support import resolved
from torch.nn import functional

from selfalign import TokenGrid, TokenGroups, UserError, build_student
from selfalign.heads import ProjectionHead, conv_head
from selfalign.tokens import one_group

FROZEN = {
    "terms.alignment.target": "frozen-encoder",
    "targets.frozen-encoder.encoders": ("timm:a", "timm:b"),
    "targets.frozen-encoder.widths": (5, 7),
}


@pytest.mark.parametrize(
    ("projector", "changes", "expected"),
    [
        (
            "mlp3",
            {"projectors.mlp3.width": 11},
            {"0.0": (11, 96), "0.2": (11, 11), "0.4": (5, 11), "1.4": (7, 11)},
        ),
        ("conv", {"projectors.conv.kernel": 5}, {"0": (5, 96, 5, 5), "1": (7, 96, 5, 5)}),
        ("sra", {}, {"0.linear1": (192, 96), "0.linear2": (5, 192), "1.linear2": (7, 192)}),
    ],
)
def test_one_per_encoder_under_the_released_names(projector, changes, expected) -> None:
    config = resolved("sit", {**FROZEN, **changes, "terms.alignment.projector": projector})
    student = build_student(config)
    state = student.state_dict()
    for name, shape in expected.items():
        assert state[f"projectors.{name}.weight"].shape == shape
        assert state[f"projectors.{name}.weight"].any()
    assert student.head_taps == {"projectors.0": 2, "projectors.1": 2}
    x = torch.randn(3, 64, 96)
    for index, width in enumerate((5, 7)):
        assert student.projectors[index](x, None, one_group(64)).shape == (3, 64, width)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("sides", [(12,), (4, 6), (2, 4, 6)])
def test_a_convolution_sees_the_image_whatever_the_order_of_tokens(kernel, sides) -> None:
    grid = TokenGrid(sides, 2)
    head = conv_head(5, 3, kernel, grid)
    images = torch.randn(2, 5, *grid.shape)
    tokens = images.flatten(2).transpose(1, 2)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(sides) - 1]
    expected = convolve(images, head.weight, head.bias, padding=kernel // 2)
    expected = expected.flatten(2).transpose(1, 2)
    order = torch.stack([torch.randperm(grid.num_tokens) for _ in range(2)])
    groups = TokenGroups(order, (1, grid.num_tokens - 1), separate=True)
    found = head(groups.sort(tokens), None, groups)
    torch.testing.assert_close(groups.restore(found), expected)
    torch.testing.assert_close(head(tokens, None, one_group(grid.num_tokens)), expected)


def test_sras_head_keeps_its_name_where_there_is_one_target() -> None:
    one = {"targets.frozen-encoder.encoders": ("timm:a",), "targets.frozen-encoder.widths": (9,)}
    student = build_student(resolved("sit", {**FROZEN, **one}))
    assert isinstance(student.ap_head, ProjectionHead)
    assert student.ap_head.linear2.out_features == 9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"projectors.conv.kernel": 4, "terms.alignment.projector": "conv"},
            ["kernel", "4", "odd"],
        ),
        ({"projectors.mlp3.width": 0, "terms.alignment.projector": "mlp3"}, ["width", "0"]),
        ({"terms.alignment.projector": "linear"}, ["projector", "linear", "mlp3", "none"]),
    ],
)
def test_refused(changes, words) -> None:
    with pytest.raises(UserError) as error:
        resolved("sra", changes)
    assert [word for word in words if word not in str(error.value)] == []


def test_no_projector_needs_the_targets_width() -> None:
    config = resolved("sit", {**FROZEN, "terms.alignment.projector": "none"})
    with pytest.raises(
        UserError, match=r"projector is 'none': the student has 96 features and .* 5 and 7"
    ):
        build_student(config)
