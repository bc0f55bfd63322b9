"""The transformer: shapes, symmetries of its groups, initialisation and names."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import randomize, resolved, small_model

from selfalign import SiT, TokenGroups, build_student, make_generator, ops
from selfalign.tokens import patchify


def inputs(model, batch=3, groups=1, seed=0):
    generator = make_generator(seed, "inputs")
    patch_values = model.channels * model.patch_size**2
    tokens = torch.randn(
        batch, model.num_tokens, patch_values, dtype=torch.float64, generator=generator
    )
    # Float32 holds these timesteps exactly.
    timesteps = torch.randint(1, 1024, (batch, groups), generator=generator).double() / 1024
    labels = torch.randint(0, max(1, model.num_classes), (batch,), generator=generator)
    return tokens, timesteps, labels


def random_groups(model, sizes, batch=3, seed=0, **settings):
    order = torch.rand(batch, model.num_tokens, generator=make_generator(seed, "o")).argsort(dim=1)
    return TokenGroups(order, sizes, **settings)


HEAD = ("ap_head",)


def assert_same_in_image_order(groups, grouped, plain):
    """Velocity, features and what heads made of them."""
    assert torch.allclose(groups.restore(grouped.velocity), plain.velocity)
    for found, expected in (
        (grouped.features, plain.features),
        (grouped.projected, plain.projected),
    ):
        assert found.keys() == expected.keys() != set()
        for name, tokens in found.items():
            assert torch.allclose(groups.restore(tokens), expected[name])


class TestShapes:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize(
        ("patch", "image_size"),
        [(1, (3, 5)), (2, (4, 4)), (2, (4, 10)), (4, (12, 8)), (8, (8, 24))],
    )
    def test_velocity_has_the_images_shape(self, channels, patch, image_size):
        model = small_model(channels=channels, patch_size=patch, image_size=image_size)
        x = torch.randn(2, channels, *image_size, dtype=torch.float64)
        velocity = model.velocity(x, torch.tensor([0.25, 0.5]).double(), torch.tensor([0, 4]))
        assert velocity.shape == x.shape
        assert velocity.isfinite().all()

    @pytest.mark.parametrize("block", [1, 2, 3])
    def test_tokens_and_features(self, block):
        model = small_model(patch_size=2)
        tokens, timesteps, labels = inputs(model)
        groups = TokenGroups(None, (6,))
        velocity, features, projected = model(
            tokens, timesteps, labels, groups, (block,), ("ap_head",)
        )
        assert velocity.shape == tokens.shape
        assert features.keys() == {block} and projected.keys() == {"ap_head"}
        assert features[block].shape == projected["ap_head"].shape == (3, 6, 24)
        alone = model.features(tokens, timesteps, labels, groups, (block,))
        assert alone.keys() == {block} and torch.equal(alone[block], features[block])

    @pytest.mark.parametrize(
        ("size", "millions"), [("S/2", 32.9), ("B/2", 130.3), ("L/2", 458.0), ("XL/2", 675.1)]
    )
    def test_sizes_have_the_parameters_of_the_published_models(self, size, millions):
        config = resolved(
            "sit", {"model.size": size}, channels=4, image_size=(32, 32), num_classes=1000
        )
        with torch.device("meta"):
            model = build_student(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        # SiT's released models also emit a (discarded) variance: 4·2² more outputs.
        count += (model.pos_embed.shape[-1] + 1) * 16
        assert abs(count / 1e6 - millions) < 0.5

    def test_learned_sigma_models_keep_the_first_channels_as_velocity(self):
        model = small_model(patch_size=2, out_channels=4)
        tokens, timesteps, labels = inputs(model)
        out = model(tokens, timesteps, labels, TokenGroups(None, (6,))).velocity
        assert out.shape == (3, 6, 4 * 4)
        x = torch.randn(3, 2, 4, 6, dtype=torch.float64)
        both = model(patchify(x, 2), timesteps, labels, TokenGroups(None, (6,))).velocity
        expected = both.reshape(3, 6, 2, 2, 4)[..., :2]  # (row, column, channel)
        velocity = patchify(model.velocity(x, timesteps[:, 0], labels), 2)
        assert torch.allclose(velocity, expected.reshape(3, 6, 8))


class TestGroups:
    @given(order=st.permutations(range(24)))
    @settings(max_examples=10, deadline=None)
    def test_the_order_of_tokens_does_not_matter_under_full_attention(self, order):
        # Positions travel with their tokens.
        model = small_model()
        tokens, timesteps, labels = inputs(model)
        groups = TokenGroups(torch.tensor(order).expand(3, -1), (24,))
        sorted_out = model(groups.sort(tokens), timesteps, labels, groups, (2,), HEAD)
        plain_out = model(tokens, timesteps, labels, TokenGroups(None, (24,)), (2,), HEAD)
        assert_same_in_image_order(groups, sorted_out, plain_out)

    @given(cuts=st.lists(st.integers(1, 23), min_size=1, max_size=7, unique=True))
    @settings(max_examples=15, deadline=None)
    def test_equal_timesteps_and_full_attention_are_one_group(self, cuts):
        model = small_model()
        bounds = [0, *sorted(cuts), 24]
        sizes = tuple(end - start for start, end in itertools.pairwise(bounds))
        tokens, timesteps, labels = inputs(model)
        groups = random_groups(model, sizes)
        grouped = model(
            groups.sort(tokens), timesteps.expand(-1, len(sizes)), labels, groups, (1,), HEAD
        )
        plain = model(tokens, timesteps, labels, TokenGroups(None, (24,)), (1,), HEAD)
        assert_same_in_image_order(groups, grouped, plain)

    @pytest.mark.parametrize("sizes", [(6, 18), (5, 8, 11), (3,) * 8])
    def test_separated_groups_do_not_see_each_other_through_all_blocks(self, sizes):
        model = small_model()
        groups = random_groups(model, sizes, whole=1, separate=True)
        tokens, timesteps, labels = inputs(model, groups=len(sizes))
        timesteps[0] = timesteps[0, 0]
        before = model(tokens, timesteps, labels, groups).velocity
        start = 0
        for group, size in enumerate(sizes):
            changed = tokens.clone()
            changed[:, start : start + size] += 1
            times = timesteps.clone()
            times[1:, group] += 1 / 16
            after = model(changed, times, labels, groups).velocity
            inside = torch.zeros(24, dtype=torch.bool)
            inside[start : start + size] = True
            assert torch.equal(after[1:, ~inside], before[1:, ~inside])
            assert (after[1:, inside] != before[1:, inside]).any(dim=-1).all()
            # the whole image sees the change everywhere
            assert (after[0] != before[0]).any(dim=-1).all()
            start += size

    def test_each_group_follows_its_own_timestep(self):
        # A group alone in its image, at its timestep, is what it is beside another one.
        model = small_model()
        groups = random_groups(model, (10, 14), separate=True)
        tokens, timesteps, labels = inputs(model, groups=2)
        both = model(tokens, timesteps, labels, groups).velocity
        for group, part in enumerate((slice(0, 10), slice(10, 24))):
            times = timesteps[:, group : group + 1].expand(-1, 2)
            alone = model(tokens, times, labels, groups).velocity
            assert torch.allclose(alone[:, part], both[:, part])

    def test_whole_samples_ignore_separation(self):
        model = small_model()
        tokens, timesteps, labels = inputs(model)
        timesteps = timesteps.expand(-1, 2)
        separated = random_groups(model, (10, 14), whole=2, separate=True)
        full = random_groups(model, (10, 14))
        a = model(tokens, timesteps, labels, separated).velocity
        b = model(tokens, timesteps, labels, full).velocity
        assert torch.allclose(a[:2], b[:2])
        assert not torch.allclose(a[2], b[2])

    def test_velocity_with_groups_is_the_sorted_forward_restored(self):
        model = small_model()
        _, timesteps, labels = inputs(model)
        x = torch.randn(3, 2, 4, 6, dtype=torch.float64)
        full = random_groups(model, (10, 14))
        plain = model.velocity(x, timesteps[:, 0], labels)
        assert torch.allclose(model.velocity(x, timesteps[:, 0], labels, full), plain)
        separated = random_groups(model, (10, 14), separate=True)
        assert not torch.allclose(model.velocity(x, timesteps[:, 0], labels, separated), plain)


class TestSamples:
    def test_are_independent_of_each_other(self):
        model = small_model()
        tokens, timesteps, labels = inputs(model, batch=4, groups=2)
        groups = random_groups(model, (10, 14), batch=4, whole=1, separate=True)
        together = model(tokens, timesteps, labels, groups).velocity
        for b in range(4):
            one = slice(b, b + 1)
            alone = TokenGroups(groups.order[one], groups.sizes, int(b < 1), separate=True)
            out = model(tokens[one], timesteps[one], labels[one], alone).velocity
            assert torch.allclose(out, together[one])


class TestLabels:
    def test_change_the_output(self):
        model = small_model()
        tokens, timesteps, labels = inputs(model)
        groups = TokenGroups(None, (24,))
        outs = [
            model(tokens, timesteps, torch.full_like(labels, c), groups).velocity for c in range(6)
        ]
        assert model.null_label == 5
        for a in range(6):
            for b in range(a):
                assert not torch.allclose(outs[a], outs[b])

    def test_are_ignored_by_an_unconditional_model(self):
        model = small_model(num_classes=0)
        assert not any(name.startswith("y_embedder") for name in model.state_dict())
        tokens, timesteps, labels = inputs(model)
        groups = TokenGroups(None, (24,))
        a = model(tokens, timesteps, labels, groups).velocity
        b = model(tokens, timesteps, torch.full_like(labels, model.null_label), groups).velocity
        assert torch.equal(a, b)


class TestFeatures:
    @pytest.mark.parametrize("block", [1, 2, 3])
    def test_are_the_named_blocks_output(self, block):
        model = small_model(head_after=block)
        tokens, timesteps, labels = inputs(model, groups=2)
        groups = random_groups(model, (10, 14), separate=True)

        def features_of(number):
            return model.features(tokens, timesteps, labels, groups, (number,))[number]

        features = features_of(block)
        projected = model(tokens, timesteps, labels, groups, heads=HEAD).projected["ap_head"]
        assert torch.allclose(projected, model.ap_head(features, None, groups))
        # Blocks without modulation have closed gates, and pass on what they get.
        for later in model.blocks[block:]:
            randomize(later.adaLN_modulation, std=0)
        assert torch.allclose(features_of(3), features)
        randomize(model.blocks[block - 1].adaLN_modulation, std=0)
        assert not torch.allclose(features_of(3), features)

    def test_reading_them_does_not_change_the_velocity(self):
        model = small_model()
        tokens, timesteps, labels = inputs(model)
        groups = TokenGroups(None, (24,))
        plain, features, projected = model(tokens, timesteps, labels, groups)
        assert features == projected == {}
        for taps in ((2,), (1, 3), ("blocks.1.attn", 2)):
            read = model(tokens, timesteps, labels, groups, taps, HEAD)
            assert torch.equal(read.velocity, plain)
            assert read.features.keys() == set(taps)


class TestTaps:
    """Features by name: what a module of any depth returns."""

    NAMES = ("blocks.1.attn", "blocks.0.mlp.fc1", "blocks.2", "x_embedder", "final_layer.linear")

    def hooked(self, model, name):
        found = []
        model.get_submodule(name).register_forward_hook(lambda _, __, out: found.append(out))
        return found

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_are_what_a_forward_hook_sees(self, name, checkpointing):
        model = small_model(gradient_checkpointing=checkpointing)
        tokens, timesteps, labels = inputs(model, groups=2)
        groups = random_groups(model, (10, 14), separate=True)
        found = self.hooked(model, name)
        features = model(tokens, timesteps, labels, groups, (name, 1)).features
        assert features.keys() == {name, 1}
        assert torch.equal(features[name], found[0])

    def test_a_blocks_name_and_number_are_the_same(self):
        model = small_model()
        arguments = (*inputs(model), TokenGroups(None, (24,)))
        features = model.features(*arguments, (2, "blocks.1"))
        assert torch.equal(features[2], features["blocks.1"])

    def test_leave_no_hooks_behind(self):
        model = small_model()
        arguments = (*inputs(model), TokenGroups(None, (24,)))
        model(*arguments, ("blocks.1.attn",))
        model.features(*arguments, ("blocks.1.attn",))
        assert not any(module._forward_hooks for module in model.modules())

    def test_a_head_may_hang_on_one(self):
        model = small_model(head_after="blocks.1.attn")
        arguments = (*inputs(model), TokenGroups(None, (24,)))
        found = self.hooked(model, "blocks.1.attn")
        output = model(*arguments, heads=HEAD)
        assert output.features == {}
        assert torch.equal(output.projected["ap_head"], model.ap_head(found[0], None, None))

    @pytest.mark.parametrize(
        ("taps", "last"),
        [
            ((1,), 1),
            ((2,), 2),
            ((2, 1), 2),
            (("blocks.0.attn",), 1),
            (("blocks.1.mlp.fc1", 1), 2),
            (("blocks.0.attn", 3), 3),
        ],
    )
    def test_later_blocks_are_not_run(self, taps, last):
        model = small_model()
        arguments = (*inputs(model), TokenGroups(None, (24,)))
        ran = []
        for number, block in enumerate(model.blocks, 1):
            block.register_forward_hook(lambda *_, number=number: ran.append(number))
        model.final_layer.register_forward_hook(lambda *_: ran.append("final"))
        expected = model(*arguments, taps).features
        ran.clear()
        features = model.features(*arguments, taps)
        assert ran == list(range(1, last + 1))
        assert features.keys() == expected.keys()
        for tap in taps:
            assert torch.equal(features[tap], expected[tap])


class TestIdleHeads:
    def test_are_not_run_and_have_a_gradient_of_zero(self):
        model = small_model()
        arguments = (*inputs(model), TokenGroups(None, (24,)))
        plain = model(*arguments).velocity
        ran = []
        model.ap_head.register_forward_hook(lambda *_: ran.append(1))
        output = model(*arguments, (), (), HEAD)
        assert ran == [] and output.projected == {}
        assert torch.equal(output.velocity, plain)
        output.velocity.square().mean().backward()
        for parameter in model.ap_head.parameters():
            assert parameter.grad is not None and not parameter.grad.any()


class TestGradientCheckpointing:
    @pytest.mark.parametrize("qk_norm", [False, True])
    def test_gives_the_same_outputs_and_gradients(self, qk_norm):
        gradients = []
        for checkpointing in (False, True):
            model = small_model(gradient_checkpointing=checkpointing, qk_norm=qk_norm)
            tokens, timesteps, labels = inputs(model, groups=2)
            groups = random_groups(model, (10, 14), whole=1, separate=True)
            velocity, _, projected = model(tokens, timesteps, labels, groups, (2,), HEAD)
            features = projected["ap_head"]
            (velocity.square().mean() + features.square().mean()).backward()
            gradients.append({n: p.grad for n, p in model.named_parameters()} | {"v": velocity})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert torch.equal(gradient, gradients[1][name]), name

    @pytest.mark.parametrize("choice", ["auto", "torch"])
    @pytest.mark.parametrize("policy", ["alternate"])
    def test_other_policies_keep_more_and_change_nothing(self, policy, choice):
        kept, gradients = {}, {}
        for checkpointing in (None, "blocks", policy):
            settings = {"checkpointing": checkpointing} if checkpointing else {}
            model = small_model(
                gradient_checkpointing=checkpointing is not None,
                dtype=torch.float32,
                hidden_size=48,
                depth=4,
                **settings,
            )
            tokens, timesteps, labels = inputs(model, groups=2)
            groups = random_groups(model, (10, 14), separate=True)
            sizes = []
            with (
                ops.use(choice),
                torch.autograd.graph.saved_tensors_hooks(
                    lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
                ),
            ):
                arguments = [x.float() if x.is_floating_point() else x for x in (tokens, timesteps)]
                model(*arguments, labels, groups).velocity.square().mean().backward()
            kept[checkpointing] = sum(sizes)
            gradients[checkpointing] = [p.grad for p in model.parameters() if p.grad is not None]
        assert kept["blocks"] < kept[None]
        for own, plain in zip(gradients[policy], gradients[None], strict=True):
            assert torch.allclose(own, plain, rtol=1e-5, atol=1e-7)

    def test_keeps_less_for_the_backward_pass(self):
        kept = []
        for checkpointing in (False, True):
            model = small_model(gradient_checkpointing=checkpointing)
            arguments = inputs(model)
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
            ):
                model(*arguments, TokenGroups(None, (24,)))
            kept.append(sum(sizes))
        assert kept[1] < kept[0] / 3


class TestInitialisation:
    def test_the_output_is_zero_and_every_block_the_identity(self):
        model = build_student(resolved("sra", channels=3)).double()
        tokens, timesteps, labels = inputs(model)
        groups = TokenGroups(None, (64,))
        velocity = model(tokens, timesteps, labels, groups).velocity
        assert torch.equal(velocity, torch.zeros_like(velocity))
        features = model.features(tokens, timesteps, labels, groups, (1, 6))
        assert torch.equal(features[6], features[1])

    def test_is_sits(self):
        model = build_student(resolved("sra", channels=4, num_classes=1000))
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            if name.endswith("bias"):
                # timestep and label embedders draw their weights from N(0, 0.02²), biases are zero
                assert not parameter.any(), name
        for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"):
            assert abs(parameters[name].std() - 0.02) < 1e-3
        assert abs(parameters["y_embedder.embedding_table.weight"].std() - 0.02) < 1e-3
        for name in ("blocks.3.attn.qkv.weight", "blocks.0.mlp.fc1.weight"):
            rows, columns = parameters[name].shape
            bound = (6 / (rows + columns)) ** 0.5
            assert 0.95 * bound < parameters[name].abs().max() <= bound
        patch = parameters["x_embedder.proj.weight"]
        assert patch.abs().max() <= (6 / (patch.shape[0] + patch[0].numel())) ** 0.5

    def test_heads_change_no_weights_but_the_embedders(self):
        # As in version 0.1.0: the embedders' normal numbers are drawn after the heads'.
        plain = build_student(resolved("sit")).state_dict()
        aligned = build_student(resolved("sra")).state_dict()
        assert aligned.keys() - plain.keys() == {
            f"ap_head.linear{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")
        }
        others = {name for name, weight in plain.items() if not torch.equal(aligned[name], weight)}
        assert others == {
            "t_embedder.mlp.0.weight",
            "t_embedder.mlp.2.weight",
            "y_embedder.embedding_table.weight",
        }

    def test_follows_the_seed(self):
        weights = []
        for seed in (1, 1, 2):
            torch.manual_seed(len(weights))  # the global generator has no say
            model = build_student(resolved("sra-dts-as", {"seed": seed}))
            weights.append(model.blocks[0].attn.qkv.weight)
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


class TestNames:
    def test_are_dits_and_sits(self):
        names = set(build_student(resolved("sra", {"model.qk_norm": True})).state_dict())
        block = {
            f"blocks.5.{module}.{kind}"
            for module in (
                "attn.qkv",
                "attn.proj",
                "attn.q_norm",
                "attn.k_norm",
                "mlp.fc1",
                "mlp.fc2",
                "adaLN_modulation.1",
            )
            for kind in ("weight", "bias")
        }
        assert {name for name in names if name.startswith("blocks.5.")} == block
        outside = {
            f"{module}.{kind}"
            for module in (
                "x_embedder.proj",
                "t_embedder.mlp.0",
                "t_embedder.mlp.2",
                "final_layer.linear",
                "final_layer.adaLN_modulation.1",
                "ap_head.linear1",
                "ap_head.linear2",
            )
            for kind in ("weight", "bias")
        }
        outside |= {"pos_embed", "y_embedder.embedding_table.weight"}
        assert {name for name in names if not name.startswith("blocks.")} == outside

    def test_the_head_exists_only_for_alignment(self):
        names = build_student(resolved("sit")).state_dict()
        assert not any(name.startswith("ap_head") for name in names)

    def test_weights_survive_a_state_dict(self):
        model, other = small_model(seed=0), small_model(seed=1)
        tokens, timesteps, labels = inputs(model)
        groups = TokenGroups(None, (24,))
        before = other(tokens, timesteps, labels, groups).velocity
        other.load_state_dict(model.state_dict())
        expected = model(tokens, timesteps, labels, groups).velocity
        after = other(tokens, timesteps, labels, groups).velocity
        assert torch.equal(after, expected)
        assert not torch.allclose(before, expected)


def test_position_features_tell_every_token_apart_and_favour_no_axis():
    model = small_model(image_size=(4, 6))
    features = model.pos_embed[0].double()
    assert features.shape == (24, 24)
    assert torch.cdist(features, features).fill_diagonal_(1).min() > 0.1
    # DiT's: the first half says which column, the second which row.
    grid = features.reshape(4, 6, 24)
    assert torch.allclose(grid[:, :, :12], grid[:1, :, :12].expand(4, -1, -1))
    assert torch.allclose(grid[:, :, 12:], grid[:, :1, 12:].expand(-1, 6, -1))
    assert torch.allclose(grid[0, :4, :12], grid[:4, 0, 12:])


def test_randomised_weights_make_every_parameter_matter():
    # The other tests compare outputs: a parameter without influence would go unseen.
    model = small_model(qk_norm=True)
    randomize(model, 5)
    model.double()
    tokens, timesteps, labels = inputs(model, groups=2)
    groups = random_groups(model, (10, 14), separate=True)
    velocity, _, projected = model(tokens, timesteps, labels, groups, heads=HEAD)
    (velocity.square().mean() + projected["ap_head"].square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_the_keyword_of_version_0_1_0():
    def make(**settings):
        torch.manual_seed(0)
        sizes = {"patch_size": 2, "hidden_size": 8, "depth": 2, "heads": 2}
        return SiT(channels=1, image_size=(4, 4), num_classes=3, **sizes, **settings)

    without, with_head = make(projection_head=False), make(projection_head=True)
    assert without.state_dict().keys() == make().state_dict().keys()
    assert with_head.head_taps == {"ap_head": 2}
    added = with_head.state_dict().keys() - without.state_dict().keys()
    assert added == {f"ap_head.linear{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
