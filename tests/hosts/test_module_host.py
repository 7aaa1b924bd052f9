"""Any module as a host: what is found, what a hook may meet, what is refused."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_core import Plane, compose, host_from_module, load_registry
from esper_core.kasmina.causality import find_causal
from esper_core.kasmina.feature_trace import trace_features
from esper_core.kasmina.feature_view import FeatureView
from esper_core.kasmina.module_host import ModuleHost
from esper_core.kasmina.slot_hook import SlotHook, replace_feature
from esper_core.leyline.errors import EsperError, IllegalCommand, UnknownName
from esper_core.leyline.injection import InjectionSpec

REGISTRY = load_registry()


def small_cnn(classes: int = 10) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, classes),
    )  # fmt: skip


class Block(nn.Module):
    def __init__(self, width: int, batch_first: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x)), None


class Transformer(nn.Module):
    """A little transformer: tuples between blocks, positions first if asked, causal if asked."""

    def __init__(self, *, positions_first: bool = False, causal: bool = False, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)
        self.blocks = nn.ModuleList(Block(16, batch_first=not positions_first) for _ in range(blocks))
        self.positions_first, self.causal = positions_first, causal

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        length = tokens.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1) if self.causal else None
        if self.positions_first:
            x = x.transpose(0, 1)
        for block in self.blocks:
            x, _ = block(x, mask=mask)
        return self.head(x.transpose(0, 1) if self.positions_first else x)


TOKENS = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))


class TestDiscovery:
    def test_a_chain_of_layers(self) -> None:
        host = host_from_module(small_cnn(), example=torch.randn(1, 3, 16, 16))
        found = [(s.name, s.layout, s.feature_shape, s.stride, s.order) for s in host.injection_specs.values()]
        assert found == [("3", "NCHW", (8, 8, 8), 2, 0), ("5", "NCHW", (12, 8, 8), 2, 1)]
        assert host.outputs == 10

    @pytest.mark.parametrize("positions_first", [False, True])
    def test_blocks_with_attention_and_ffn(self, positions_first: bool) -> None:
        host = host_from_module(Transformer(positions_first=positions_first), example=TOKENS)
        assert [(s.name, s.role, s.feature_shape, s.layout) for s in host.injection_specs.values()] == [
            (f"blocks.{i}{part}", role, (9, 16), "NLD")
            for i in range(2)
            for part, role in ((".attn", "after_attention"), (".mlp", "after_ffn"), ("", "block"))
        ]

    @pytest.mark.parametrize("causal", [False, True])
    def test_causality_is_measured(self, causal: bool) -> None:
        host = host_from_module(Transformer(causal=causal), example=TOKENS)
        assert all(("causal" in s.tags) == causal for s in host.injection_specs.values() if s.role != "after_ffn")

    def test_maps_with_channels_last(self) -> None:
        class Last(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem = nn.Conv2d(3, 8, 4, 4)
                self.blocks = nn.Sequential(*(
                    nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)
                ))  # fmt: skip
                self.head = nn.Linear(8, 5)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.blocks(self.stem(x).permute(0, 2, 3, 1)).mean((1, 2)))

        host = host_from_module(Last(), example=torch.randn(1, 3, 32, 32))  # 8 channels on 8×8: only weights can tell
        assert {s.name: (s.layout, s.feature_shape) for s in host.injection_specs.values()} == {
            "blocks.0": ("NHWC", (8, 8, 8)),
            "blocks.1": ("NHWC", (8, 8, 8)),
        }

    def test_vectors_and_signals_and_volumes(self) -> None:
        mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))
        signal = nn.Sequential(
            nn.Conv1d(1, 8, 5, padding=2), nn.ReLU(), nn.Conv1d(8, 8, 5, padding=2), nn.AdaptiveAvgPool1d(1),
            nn.Flatten(), nn.Linear(8, 10),
        )  # fmt: skip
        volume = nn.Sequential(
            nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1), nn.AdaptiveAvgPool3d(1),
            nn.Flatten(), nn.Linear(8, 10),
        )  # fmt: skip
        for model, shape, layout, feature in (
            (mlp, (1, 8, 8), "NLD", (1, 24)),
            (signal, (1, 40), "NLD", (40, 8)),
            (volume, (1, 4, 6, 5), "NCHW", (8, 24, 5)),
        ):
            host = host_from_module(model, example=torch.randn(1, *shape))
            assert [(s.layout, s.feature_shape) for s in host.injection_specs.values()] == [(layout, feature)] * 2
            check_identity_and_growth(host, torch.randn(3, *shape))

    def test_a_layer_that_runs_often_is_the_last_resort_and_said_aloud(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block, self.head = Block(16), nn.Linear(16, 4)

            def forward(self, x: Tensor) -> Tensor:
                for _ in range(3):
                    x, _ = self.block(x)
                return self.head(x.mean(1))

        host = host_from_module(Shared(), example=torch.randn(1, 5, 16))
        assert "block" in host.injection_specs
        assert any("runs 3 times" in note for note in host.notes)
        check_identity_and_growth(host, torch.randn(3, 5, 16))

    def test_fused_layers_compute_the_same_with_and_without_slots(self) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        model = nn.Sequential(nn.Embedding(30, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 30))
        host = host_from_module(model, example=TOKENS)
        assert [s.role for s in host.injection_specs.values()] == [
            "after_attention",
            "block",
            "after_attention",
            "stage",
        ]
        check_identity_and_growth(host, TOKENS)
        assert torch.backends.mha.get_fastpath_enabled()

    def test_a_branch_without_gradient_is_no_place(self) -> None:
        class Detached(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.aside = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)) for _ in range(2))
                self.head = nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.used(x).mean((2, 3)) + self.aside(x).detach().mean((2, 3)))

        host = host_from_module(Detached(), example=torch.randn(1, 3, 8, 8))
        assert list(host.injection_specs) == ["used"]

    def test_an_output_that_nobody_takes_is_no_place(self) -> None:
        class Tower(nn.Module):
            """Its first output is used inside only, as in vision towers that pool by themselves."""

            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList([Block(16), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))])

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                x = self.blocks[1](self.blocks[0](x)[0])
                x = x + 1
                return x, x.mean(1)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.tower, self.head = Tower(), nn.Linear(16, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.tower(x)[1])

        points = host_from_module(Model(), example=torch.randn(2, 5, 16)).injection_specs
        assert "tower.blocks.0" in points and "tower" not in points

    def test_large_models_are_measured_without_data(self) -> None:
        with torch.device("meta"):
            wide = nn.Sequential(
                *(nn.Sequential(nn.Linear(9000, 9000), nn.GELU(), nn.Linear(9000, 9000)) for _ in range(3))
            )
        host = host_from_module(wide, example=torch.empty(1, 4, 9000, device="meta"))
        assert list(host.injection_specs) == ["0", "1"]

    def test_the_model_is_left_as_it_was(self) -> None:
        model = small_cnn()
        model[0].requires_grad_(False)
        model.train()
        model[1].eval()
        state = copy.deepcopy(model.state_dict())
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        host_from_module(model, example=torch.randn(2, 3, 16, 16, generator=torch.Generator()))
        assert torch.equal(torch.rand(3), expected), "the global random state moved"
        assert not model[0].weight.requires_grad and model[4].weight.requires_grad
        assert model.training and not model[1].training
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    @pytest.mark.parametrize(
        "model", [small_cnn(), Transformer(), nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 8), nn.Linear(8, 3))]
    )
    def test_an_example_is_tried_out(self, model: nn.Module) -> None:
        assert host_from_module(model).injection_specs

    def test_fake_and_real_measurements_agree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from esper_core.kasmina import feature_trace

        for model, example in ((small_cnn(), torch.randn(1, 3, 16, 16)), (Transformer(), TOKENS)):
            real = host_from_module(model, example=example).injection_specs
            with monkeypatch.context() as patch:
                patch.setattr(feature_trace, "FAKE_FROM", 0)
                assert dict(host_from_module(model, example=example).injection_specs) == dict(real)


class TestRefusals:
    def test_no_points(self) -> None:
        with pytest.raises(EsperError, match="no point at which a seed could grow"):
            host_from_module(nn.Linear(4, 2), example=torch.randn(1, 4))

    def test_a_model_that_does_not_run(self) -> None:
        with pytest.raises(EsperError, match="does not run on the example: RuntimeError"):
            host_from_module(small_cnn(), example=torch.randn(1, 4, 16, 16))

    def test_no_example_fits(self) -> None:
        class Picky(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(3, 3))

            def forward(self, x: Tensor) -> Tensor:
                raise ValueError("never")

        with pytest.raises(EsperError, match="no input for Picky could be found"):
            host_from_module(Picky())

    def test_unknown_and_unfit_points(self) -> None:
        model, example = small_cnn(), torch.randn(1, 3, 16, 16)
        with pytest.raises(UnknownName, match="no submodule 'layer1'"):
            host_from_module(model, ["layer1"], example=example)
        with pytest.raises(UnknownName):
            ModuleHost(model, {"a": ("nope", InjectionSpec("a", 8, "NCHW", 0, (8, 8, 8)))})

        class Idle(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.body(x)

        with pytest.raises(EsperError, match="'idle' does not run"):
            host_from_module(Idle(), ["idle"], example=torch.randn(1, 3, 4))

    def test_second_slot_and_unknown_point(self) -> None:
        host = host_from_module(small_cnn(), ["2"], example=torch.randn(1, 3, 16, 16))
        host.register_slot("2", nn.Identity())
        with pytest.raises(IllegalCommand, match="already has a slot"):
            host.register_slot("2", nn.Identity())
        with pytest.raises(UnknownName, match="no injection point '9'"):
            host.register_slot("9", nn.Identity())


@dataclass
class Output(OrderedDict):
    hidden: Any = None
    other: Any = None

    def __post_init__(self) -> None:
        self["hidden"], self["other"] = self.hidden, self.other


Pair = namedtuple("Pair", "feature rest")


class TestHooks:
    @pytest.mark.parametrize(
        "output",
        [(torch.ones(2), 7), [torch.ones(2), 7], Pair(torch.ones(2), 7), {"a": torch.ones(2), "b": 7},
         ((torch.ones(2), 3), 7), Output(torch.ones(2), 7)],
        ids=["tuple", "list", "namedtuple", "dict", "nested", "dataclass"],
    )  # fmt: skip
    def test_containers_keep_their_type_and_the_rest(self, output: Any) -> None:
        changed = replace_feature(output, torch.zeros(2))
        assert type(changed) is type(output)
        before, after = list(output.values() if isinstance(output, dict) else output), None
        after = list(changed.values() if isinstance(changed, dict) else changed)
        assert after[1:] == before[1:]
        first = after[0][0] if isinstance(after[0], tuple) else after[0]
        assert not first.any()

    def test_a_dormant_slot_leaves_the_very_output(self) -> None:
        view = FeatureView.of(3, 0, 1)
        hook, output = SlotHook(nn.Identity(), view), (torch.randn(2, 3, 4), None)
        assert hook(nn.Identity(), (), {}, output) is None

    def test_hooks_pickle_and_copy(self) -> None:
        hook = pickle.loads(pickle.dumps(SlotHook(nn.Linear(2, 2), FeatureView.of(3, 1, 2))))
        assert hook.view == FeatureView.of(3, 1, 2)

    @pytest.mark.parametrize("rank", [2, 3, 4, 5])
    def test_views_are_reversible(self, rank: int) -> None:
        for batch in (0, 1):
            for channel in (axis for axis in range(rank) if axis != batch):
                view, feature = FeatureView.of(rank, batch, channel), torch.randn(2, 3, 4, 5, 6)[(0,) * (5 - rank)]
                seen = view.see(feature)
                assert seen.dim() == {"NLD": 3}.get(view.layout, 4)
                assert seen.shape[0] == feature.shape[batch]
                assert seen.shape[1 if view.layout == "NCHW" else -1] == feature.shape[channel]
                assert torch.equal(view.restore(seen, feature), feature)

    def test_dormant_hook_costs_microseconds(self) -> None:
        import time

        model = nn.Sequential(*(nn.Identity() for _ in range(200)))
        host = ModuleHost(
            model, {f"p{i}": (f"{i}", InjectionSpec(f"p{i}", 4, "NCHW", i, (4, 1, 1))) for i in range(200)}
        )
        x = torch.randn(1, 4, 1, 1)

        def seconds() -> float:
            best = 1.0
            for _ in range(30):
                start = time.perf_counter()
                model(x)
                best = min(best, time.perf_counter() - start)
            return best

        bare = seconds()
        for name in host.injection_specs:
            host.register_slot(name, nn.Identity())
        assert (seconds() - bare) / 200 < 20e-6  # 3 µs on an idle core


def check_identity_and_growth(host: ModuleHost, inputs: Tensor) -> None:
    host.module.eval()
    with torch.no_grad():
        bare = host.forward_with_slots(inputs)
        plane = Plane(host, REGISTRY)
        assert torch.equal(bare, host.forward_with_slots(inputs))
    for path, slot in plane.slots.items():
        plane.germinate(path, "depthwise" if slot.spec.layout == "NCHW" else "ffn")
    with torch.no_grad():
        assert torch.equal(bare, host.forward_with_slots(inputs))
    host.forward_with_slots(inputs).square().sum().backward()
    for parameters in plane.seed_groups().values():
        assert any(p.grad is not None and p.grad.any() for p in parameters)


class TestCompiled:
    def test_one_graph_with_dormant_and_live_slots(self) -> None:
        torch.compiler.reset()
        for model, example in ((small_cnn(), torch.randn(2, 3, 16, 16)), (Transformer(), TOKENS)):
            host = host_from_module(model.eval(), example=example)
            plane = Plane(host, REGISTRY)
            path, slot = next(iter(plane.slots.items()))
            plane.germinate(path, "conv" if slot.spec.layout == "NCHW" else "ffn")
            compiled = torch.compile(host.forward_with_slots, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(example), host.forward_with_slots(example))


class TestComposed:
    def test_equals_the_host_with_its_seeds_and_has_no_hooks(self) -> None:
        for model, example in ((small_cnn(), torch.randn(2, 3, 16, 16)), (Transformer(positions_first=True), TOKENS)):
            host = host_from_module(model.eval(), example=example)
            plane = Plane(host, REGISTRY)
            for path, slot in plane.slots.items():
                plane.germinate(path, "conv" if slot.spec.layout == "NCHW" else "ffn")
                for _ in range(2):
                    plane.advance(path, gated=False)
                plane.module.get_submodule(path.replace(".", ":"))
                with torch.no_grad():
                    for parameter in slot.seed.parameters():
                        parameter.add_(0.1 * torch.randn_like(parameter))
                slot.alpha.fill_(0.7)
                plane.growths[path].alpha = 0.7
            expected = host.forward_with_slots(example)
            composed = compose(plane)
            assert torch.equal(composed(example), expected)
            assert not any(m._forward_hooks for m in composed.modules())
            assert not torch.equal(expected, model_without(host)(example))
            twin = copy.deepcopy(composed)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.zero_()
            assert torch.equal(composed(example), expected), "a copy shares its parts"
            exported = torch.export.export(composed, (example,), strict=False).module()
            torch.testing.assert_close(exported(example), expected)
            assert host.forward_with_slots(example).equal(expected), "composing changed the host"


def model_without(host: ModuleHost) -> nn.Module:
    return host.compose_with({})


def test_causality_needs_a_token_that_matters() -> None:
    class Blind(nn.Module):
        """Ignores its tokens: nothing can be said of its causality."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.body(torch.ones(*tokens.shape, 4))

    assert find_causal(Blind(), TOKENS, {"body": FeatureView.of(3, 0, 2)}) == frozenset()


@pytest.mark.parametrize("causal", [True, False])
def test_causality_of_a_model_that_insists_on_its_end_token(causal: bool) -> None:
    class Insists(nn.Module):
        """Reads its answer at the end token, as T5's classifier does."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(8, 4), nn.Identity()

        def forward(self, tokens: Tensor) -> Tensor:
            if not bool((tokens[:, -1] == 1).all()):
                raise ValueError("Each example must contain at least one <eos> token.")
            features = self.embed(tokens)
            return self.mix(features.cumsum(1) if causal else features + features.mean(1, keepdim=True))

    tokens = torch.tensor([[5, 4, 3, 2, 1]])
    found = find_causal(Insists(), tokens, {"mix": FeatureView.of(3, 0, 2)})
    assert found == (frozenset({"mix"}) if causal else frozenset())


def test_trace_sees_calls_in_order() -> None:
    trace = trace_features(small_cnn(), torch.randn(1, 3, 16, 16))
    assert [t.path for t in trace.ran] == [str(i) for i in range(9)] + [""]
    assert trace.ran[0].shape == (2, 8, 16, 16) and trace.ran[0].single_shape == (1, 8, 16, 16)
    assert all(t.flows for t in trace.ran)
