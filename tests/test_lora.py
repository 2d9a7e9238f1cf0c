"""Low-rank adapters: by hand, against `peft`, and what is saved."""

import copy
import warnings
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_INSTRUCTIONS, TINY_SENTIMENT, randomised, tiny_config
from torch import Tensor, nn

import finetune_lora_classifier
import finetune_qlora_instructions
import generation
import lora
from lora import (
    Int4Linear,
    Int8Linear,
    LoRAConfig,
    LoRAEmbedding,
    LoRALinear,
    apply_lora,
    convert_weights,
    count_parameters,
    fastest_weights,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    merge_lora,
    quantize_4bit,
    resolve_targets,
)
from model import GPTClassificationModel, GPTConfig, GPTModel
from training import from_options

TARGETS = ("qkv", "mlp.proj", "token_embedding")
CONFIG = LoRAConfig(r=3, lora_alpha=6.0, target_modules=TARGETS)


@pytest.fixture
def classifier() -> GPTClassificationModel:
    """Two tiny layers and a head, random everywhere."""
    return randomised(GPTClassificationModel(GPTModel(tiny_config(50)), 2))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Six texts of 4 to 9 tokens."""
    torch.manual_seed(3)
    return torch.randint(50, (6, 9)), torch.tensor([9, 4, 7, 5, 9, 6])


def adapted(model: nn.Module, config: LoRAConfig = CONFIG) -> nn.Module:
    """The model with adapters that change something."""
    apply_lora(model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_a_layer_by_hand():
    base = nn.Linear(2, 2, bias=False)
    layer = LoRALinear(base, LoRAConfig(r=1, lora_alpha=3.0))
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.lora_A.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_B.copy_(torch.tensor([[2.0], [0.5]]))
    # W x = (5, 11); A x = -1; (alpha / r) B A x = 3 * (-2, -0.5)
    assert layer(torch.tensor([[1.0, 2.0]])).tolist() == [[-1.0, 9.5]]
    assert layer.delta_weight().tolist() == [[6.0, -6.0], [1.5, -1.5]]


def test_an_adapted_embedding_by_hand():
    base = nn.Embedding(3, 2)
    layer = LoRAEmbedding(base, LoRAConfig(r=1, lora_alpha=3.0))
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        layer.lora_embedding_A.copy_(torch.tensor([[0.0, 1.0, -1.0]]))
        layer.lora_embedding_B.copy_(torch.tensor([[2.0], [0.5]]))
    # token 1: (3, 4) + 3 * 1 * (2, 0.5); token 0 has a zero in A
    assert layer(torch.tensor([[1, 0]])).tolist() == [[[9.0, 5.5], [1.0, 2.0]]]
    assert layer.delta_weight().tolist() == [[0.0, 0.0], [6.0, 1.5], [-6.0, -1.5]]


def test_a_new_adapter_changes_nothing_and_starts_as_lora_does(classifier, batch):
    before = classifier(*batch)
    apply_lora(classifier, CONFIG)
    assert torch.equal(classifier(*batch), before)
    layer = classifier.backbone.blocks[0].attn.qkv
    assert layer.lora_A.shape == (3, 16) and layer.lora_B.shape == (48, 3)
    assert not layer.lora_B.any()
    embedding = classifier.backbone.token_embedding
    assert embedding.lora_embedding_A.shape == (3, 50)
    assert embedding.lora_embedding_B.shape == (16, 3)
    assert not embedding.lora_embedding_A.any()
    assert 0.5 < embedding.lora_embedding_B.std() < 2
    bound = 1 / 16**0.5  # Kaiming-uniform with a = sqrt(5) of 16 inputs
    assert layer.lora_A.abs().max() <= bound and layer.lora_A.std() > bound / 3


def test_applying_twice_is_applying_once(classifier, batch):
    adapted(classifier)
    names, before = list(classifier.state_dict()), classifier(*batch)
    apply_lora(classifier, LoRAConfig(r=1, target_modules=("attn.proj",)))
    assert list(classifier.state_dict()) == names
    assert torch.equal(classifier(*batch), before)


def test_only_adapters_and_head_train(classifier):
    apply_lora(classifier, CONFIG)
    layers = [f"backbone.blocks.{i}.{t}" for i in range(2) for t in ("attn.qkv", "mlp.proj")]
    expected = {f"{layer}.lora_{m}" for layer in layers for m in "AB"}
    expected |= {f"backbone.token_embedding.lora_embedding_{m}" for m in "AB"}
    expected |= {"classifier_head.weight", "classifier_head.bias"}
    assert {n for n, p in classifier.named_parameters() if p.requires_grad} == expected
    assert set(lora_state_dict(classifier)) == expected


def test_the_default_trains_under_one_percent_of_the_default_model():
    classifier = GPTClassificationModel(GPTModel(GPTConfig()), 2)
    apply_lora(classifier, from_options(LoRAConfig, finetune_lora_classifier.RECIPE))
    trained, total = count_parameters(classifier)
    assert trained == 8 * (2048 + 192) + 8 * (192 + 576) + 2 * 192 + 2
    assert total == sum(p.numel() for p in classifier.parameters())
    assert trained < 0.01 * total


@pytest.mark.parametrize(
    "target",
    [
        "q_proj",
        "blocks.2.attn.qkv",
        "blocks.-3.attn.qkv",
        "classifier_head",  # trained anyway
        "head",  # a classifier does not read it: the adapter would learn nothing
    ],
)
def test_a_target_that_matches_nothing_is_an_error_with_the_names_that_exist(
    target: str, classifier
):
    before = list(classifier.state_dict())
    with pytest.raises(ValueError) as error:
        apply_lora(classifier, LoRAConfig(target_modules=("qkv", target)))
    assert str(error.value) == (
        f"target_modules: {target} is no layer: the 2 blocks and the layers around them have "
        "token_embedding, attn.qkv, attn.proj, mlp.fc, mlp.proj"
    )
    assert list(classifier.state_dict()) == before


@pytest.mark.parametrize("names", ["qkv,fc", "qkv fc", ("qkv,", "fc"), ("qkv", "fc"), ["qkv , fc"]])
def test_targets_are_separated_by_commas_or_spaces(names):
    assert LoRAConfig(target_modules=names).target_modules == ("qkv", "fc")


@pytest.mark.parametrize("n_layer", [1, 2, 12])
def test_a_negative_block_is_counted_from_the_end(n_layer: int):
    model = GPTModel(tiny_config(50, n_layer=n_layer))
    config = LoRAConfig(target_modules=("blocks.-1.attn.qkv", f"blocks.-{n_layer}.mlp.fc"))
    resolved = (f"blocks.{n_layer - 1}.attn.qkv", "blocks.0.mlp.fc")
    assert resolve_targets(model, config).target_modules == resolved
    apply_lora(model, config)
    assert {name for name, _ in lora_layers(model)} == set(resolved)
    for name in resolved:
        assert resolve_targets(GPTModel(model.config), LoRAConfig(target_modules=(name,)))


def test_a_layer_that_two_targets_name_is_wrapped_once(classifier):
    apply_lora(classifier, LoRAConfig(target_modules=("proj", "attn.proj")))
    assert not any("base_layer.base_layer" in name for name, _ in classifier.named_modules())
    assert len([*lora_layers(classifier)]) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_an_adapter_in_float32_on_a_base_in_half_precision(dtype: torch.dtype, position: str):
    """Logits and gradients of A and B as in float32, up to the rounding of the base."""
    base = randomised(GPTModel(tiny_config(50, position=position))).to(dtype)
    config = LoRAConfig(r=3, target_modules=(*TARGETS, "head"))
    half, full = adapted(base, config), adapted(copy.deepcopy(base).float(), config)
    load_lora_state_dict(full, lora_state_dict(half))
    ids = torch.arange(14).view(2, 7)
    gradients = []
    for model in (half, full):
        logits = model(ids[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}
        gradients.append({name: p.grad for name, p in trained.items()})
    assert gradients[0].keys() == gradients[1].keys() and half(ids).dtype == dtype
    error = 0.1 if dtype == torch.bfloat16 else 0.02
    assert relative_error(half(ids), full(ids)) < error
    for name, gradient in gradients[0].items():
        assert relative_error(gradient, gradients[1][name]) < error, name
    merged = copy.deepcopy(half)
    merge_lora(merged)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    merge_lora(full)
    expected = full.blocks[1].attn.qkv.weight.to(dtype)  # added in float32, rounded once
    assert torch.equal(merged.blocks[1].attn.qkv.weight, expected)
    assert relative_error(merged(ids), full(ids)) < error


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("n_embd", [64, 16])  # bitsandbytes, and plain PyTorch
def test_a_4_bit_base_in_bfloat16_merges_into_bfloat16(n_embd: int):
    base = randomised(GPTModel(tiny_config(50, n_embd=n_embd))).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_4bit(base, torch.bfloat16)
    ids = torch.arange(7)[None]
    logits = adapted(base, LoRAConfig(r=3, target_modules=("qkv", "mlp.proj")))(ids)
    exact = copy.deepcopy(base).float()
    merge_lora(exact, torch.float32)
    for name, adapter in lora_layers(base):
        weight = lora.dequantize_nf4(lora.quantized_weight(adapter.base_layer)).float()
        expected = weight + adapter.delta_weight()
        torch.testing.assert_close(exact.get_submodule(name).weight, expected, rtol=0, atol=0)
    merge_lora(base)
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    assert relative_error(base(ids), logits.float()) < 0.1


def test_merging_gives_the_same_logits_and_can_be_done_twice(classifier, batch):
    names = set(classifier.state_dict())
    plain = classifier(*batch)
    before = adapted(classifier)(*batch)
    assert not torch.allclose(before, plain, atol=1e-2)
    for _ in range(2):
        merge_lora(classifier)
        torch.testing.assert_close(classifier(*batch), before, atol=1e-4, rtol=1e-4)
    assert set(classifier.state_dict()) == names


@pytest.mark.parametrize("T", [7, 1])
@pytest.mark.parametrize(
    "target",
    ["token_embedding", "position_embedding", "qkv", "attn.proj", "fc", "mlp.proj", "head"],
)
def test_the_model_reads_every_layer_through_its_adapter(target: str, T: int):
    model = randomised(GPTModel(tiny_config(50, position="learned"))).eval()
    plain, ids = copy.deepcopy(model), torch.arange(T)[None] + 5
    adapted(model, LoRAConfig(r=3, target_modules=(target,)))
    logits = model(ids)
    assert not torch.allclose(logits, plain(ids), atol=1e-3)
    merge_lora(model)
    torch.testing.assert_close(model(ids), logits)


def test_an_adapter_moves_to_another_copy_of_the_base(classifier, batch):
    copied = copy.deepcopy(classifier)
    expected = adapted(classifier)(*batch)
    apply_lora(copied, CONFIG)
    load_lora_state_dict(copied, lora_state_dict(classifier))
    assert torch.equal(copied(*batch), expected)


def test_an_adapter_that_does_not_fit_is_refused(classifier):
    adapter = lora_state_dict(adapted(copy.deepcopy(classifier)))
    apply_lora(classifier, LoRAConfig(r=2, target_modules=TARGETS))
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_lora_state_dict(classifier, adapter)
    del adapter["classifier_head.bias"]
    with pytest.raises(RuntimeError, match=r"classifier_head\.bias is in the adapter or"):
        load_lora_state_dict(classifier, adapter)


@pytest.mark.parametrize(
    "wrong", [{"r": 0}, {"lora_alpha": 0.0}, {"lora_dropout": 1.0}, {"target_modules": ()}]
)
def test_values_out_of_range_are_refused(wrong: dict):
    with pytest.raises(ValueError):
        LoRAConfig(**wrong)


def test_lora_dropout_hides_inputs_from_the_adapter_alone():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 4), LoRAConfig(r=2, lora_dropout=0.5))
    nn.init.normal_(layer.lora_B)
    x = torch.ones(1, 64)
    assert not torch.equal(layer(x), layer(x))
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


# ---- scripts

SAMPLE = ["--dataset", "sample", "--max-examples", "80"]


def test_the_default_targets_follow_the_base(base_checkpoint: Path, tmp_path: Path):
    """The last block of a base of two; the checkpoint records its number."""
    options = ["--base", str(base_checkpoint), "--out-dir", str(tmp_path), *SAMPLE]
    assert finetune_lora_classifier.main([*options, *TINY_SENTIMENT]) == 0
    path = tmp_path / "lora_classifier_weights.pth"
    model, _, checkpoint = generation.load_model(path)
    targets = ("token_embedding", "blocks.1.attn.qkv")
    assert checkpoint["lora_config"]["target_modules"] == targets
    assert {name for name, _ in lora_layers(model)} == {f"backbone.{name}" for name in targets}


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (finetune_lora_classifier, TINY_SENTIMENT),
        (finetune_qlora_instructions, TINY_INSTRUCTIONS),
    ],
)
@pytest.mark.parametrize("targets", [["qkv,q_proj"], ["qkv", "q_proj"]])
def test_an_unknown_target_ends_a_script_before_it_trains(
    script: ModuleType,
    options: list[str],
    targets: list[str],
    base_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    paths = ["--base", str(base_checkpoint), "--out-dir", str(tmp_path / "out")]
    assert script.main([*paths, *SAMPLE, *options, "--target-modules", *targets]) == 2
    assert "error: target_modules: q_proj is no layer: the 2 blocks" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.pth"))


# ---- peft as oracle


def peft_twin(model: nn.Module, config: LoRAConfig) -> peft.PeftModel:
    """The same model and the same initial adapter in `peft`."""
    adapter = {k: v.clone() for k, v in lora_state_dict(model).items()}
    plain = copy.deepcopy(model)
    merge_lora(plain)  # A or B is zero: takes the adapters off
    twin = peft.get_peft_model(
        plain,
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            target_modules=list(config.target_modules),
            modules_to_save=["classifier_head"],
        ),
    )
    places = dict(twin.named_parameters())
    with torch.no_grad():
        for name, tensor in adapter.items():
            if "lora_" in name:
                leaf = "default" if "embedding" in name else "default.weight"
                places[f"base_model.model.{name}.{leaf}"].copy_(tensor)
    return twin


def test_twenty_steps_give_the_losses_of_peft(classifier, batch):
    apply_lora(classifier, CONFIG)
    twin = peft_twin(classifier, CONFIG)
    trained = [p for p in twin.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == count_parameters(classifier)[0]
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    losses: list[list[float]] = []
    for model in (classifier, twin):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.02)
        losses.append([])
        for _ in range(20):
            loss = F.cross_entropy(model(*batch), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.5 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ---- 8-bit and 4-bit weights for inference


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_eight_bit_weights_are_rounded_to_127ths_of_the_largest_of_a_row(rows: int):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(rows, 2, 64).bfloat16()
    scales = layer.weight.abs().amax(1, keepdim=True) / 127
    rounded = (layer.weight / scales).round() * scales
    assert (rounded - layer.weight).abs().max() <= scales.max() / 2 * 1.001
    expected = F.linear(x.double(), rounded.double(), layer.bias.double())
    layer.bias.data = layer.bias.data.bfloat16()
    torch.testing.assert_close(Int8Linear(layer)(x).double(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("rows", [1, 40])
def test_four_bit_weights_are_sixteen_steps_from_the_minimum_to_the_maximum_of_32(rows: int):
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 64, bias=False), torch.randn(rows, 96).bfloat16()
    groups = layer.weight.detach().view(64, 3, 32)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    steps = ((groups - low) / (high - low) * 15).round()
    rounded = (low + steps * (high - low) / 15).view(64, 96)
    expected = F.linear(x.double(), rounded.double())
    torch.testing.assert_close(Int4Linear(layer)(x).double(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("weights", "error"), [("fp32", 1e-5), ("bf16", 0.02), ("int8", 0.035), ("int4", 0.35)]
)
def test_each_kind_of_weights_gives_nearly_the_same_logits(
    weights: str, error: float, dtype: torch.dtype
):
    """Activations, too, are in float32 where this is the faster type for many tokens."""
    torch.manual_seed(0)
    options = {"norm": "rms", "activation": "swiglu", "tie_weights": True}
    model = GPTModel(GPTConfig(vocab_size=64, n_embd=64, n_head=2, n_layer=2, **options)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(64, (2, 24))
    expected = model(ids).detach()
    embedding = model.token_embedding.weight.detach().clone()
    convert_weights(model, weights, dtype)
    activations = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(weights, dtype)
    for tokens in (ids, ids[:1, :4]):  # few rows have kernels of their own
        found = model(tokens)
        assert model.hidden(tokens).dtype == found.dtype == activations
        wanted = expected[: len(tokens), : tokens.shape[1]]
        assert (found.float() - wanted).norm() <= error * wanted.norm()
    kind = {"int8": Int8Linear, "int4": Int4Linear}.get(weights, nn.Linear)
    assert type(model.blocks[1].mlp.fc) is kind
    assert type(model.head) is (Int8Linear if weights.startswith("int") else nn.Linear)
    embedded = model.token_embedding(torch.arange(64)).float()
    torch.testing.assert_close(embedded, embedding, atol=2e-3, rtol=0.01)
    if weights.startswith("int"):
        assert model.token_embedding.weight is model.head.weight  # held once
    assert not any(p.requires_grad for p in model.parameters())


def test_weights_without_a_kernel_are_not_chosen(monkeypatch: pytest.MonkeyPatch):
    def missing(*_: Tensor) -> Tensor:
        raise NotImplementedError("no kernel")

    seconds = {torch.float32: 3.0, torch.bfloat16: 2.0, torch.int8: 1.0}

    def timed(function, **_):
        function()
        return [seconds[function.func[0].weight.dtype]]

    monkeypatch.setattr(lora.timeit, "repeat", timed)
    layer = nn.Linear(32, 16)
    assert {fastest_weights(layer, dtype) for dtype in (torch.bfloat16, torch.float32)} == {"int8"}
    monkeypatch.setattr(torch, "_weight_int8pack_mm", missing)
    assert fastest_weights(layer, torch.bfloat16) == "bf16"
    assert fastest_weights(layer, torch.float32) == "fp32"  # in bf16 a prompt would be slow
    seconds[torch.bfloat16] = 4.0
    assert fastest_weights(layer, torch.bfloat16) == "fp32"
    elsewhere = nn.Linear(32, 16, device="meta")  # only a CPU is timed
    assert fastest_weights(elsewhere, torch.bfloat16) == "bf16"
    assert fastest_weights(elsewhere, torch.float32) == "fp32"
