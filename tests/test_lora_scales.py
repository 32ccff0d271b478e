"""The scale of a LoRA's updates: PEFT's rules, alpha in the file, and alpha that nobody says."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from cogvideox_jax.conversion import lora
from cogvideox_jax.errors import UserError

# The fields that PEFT 0.21 writes, of which few matter here.
WRITTEN = {
  "alpha_pattern": {},
  "base_model_name_or_path": None,
  "bias": "none",
  "fan_in_fan_out": False,
  "init_lora_weights": True,
  "layers_to_transform": None,
  "loftq_config": {},
  "lora_alpha": 4,
  "lora_bias": False,
  "lora_dropout": 0.0,
  "megatron_core": "megatron.core",
  "peft_type": "LORA",
  "r": 4,
  "rank_pattern": {},
  "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
  "use_dora": False,
  "use_qalora": False,
  "use_rslora": False,
}
Q0, K0, V0, OUT0 = (f"transformer_blocks.0.attn1.{m}" for m in ("to_q", "to_k", "to_v", "to_out.0"))
Q1, Q10 = "transformer_blocks.1.attn1.to_q", "transformer_blocks.10.attn1.to_q"
MODULES = (Q0, K0, V0, OUT0, Q1, Q10)
WIDTH = 8
SAT_NAME = "model.diffusion_model.transformer.layers.0.attention.query_key_value.matrix_{}.0"


def matrices(ranks=()):
  ranks = {**dict.fromkeys(MODULES, 4), **dict(ranks)}
  named = {}
  for module, rank in ranks.items():
    named[f"transformer.{module}.lora_A.weight"] = np.ones((rank, WIDTH), np.float32)
    named[f"transformer.{module}.lora_B.weight"] = np.ones((WIDTH, rank), np.float32)
  return named


def header(**changes):
  """The header that diffusers writes with a training's config of PEFT: the keys are sorted."""
  fields = {f"transformer.{name}": value for name, value in {**WRITTEN, **changes}.items()}
  return {"format": "pt", "lora_adapter_metadata": json.dumps(fields, indent=2, sort_keys=True)}


def write(path, metadata=None, ranks=(), **more):
  save_file({**matrices(ranks), **more}, path, metadata=metadata)
  return path


# Each is what PEFT 0.21.2 has computed for a transformer of diffusers with this header.
PEFTS = {
  "one alpha": ({}, {}, {}),
  "another alpha": ({"lora_alpha": 8}, {}, dict.fromkeys(MODULES, 2.0)),
  "half an alpha": ({"lora_alpha": 0.5}, {}, dict.fromkeys(MODULES, 0.125)),
  "regular expression": (
    {"alpha_pattern": {r"attn1\.to_(q|k)": 16}}, {}, {Q0: 4, K0: 4, Q1: 4, Q10: 4},
  ),
  "exact": ({"alpha_pattern": {Q1: 16}}, {}, {Q1: 4}),
  "anchored": ({"alpha_pattern": {f"^{Q1}": 16}}, {}, {Q1: 4}),
  "anchored, in the middle": ({"alpha_pattern": {"^attn1.to_q": 16}}, {}, {}),
  "suffix": ({"alpha_pattern": {"to_q": 16}}, {}, {Q0: 4, Q1: 4, Q10: 4}),
  "part of a word": ({"alpha_pattern": {"q": 16}}, {}, {}),
  "the last of a path": ({"alpha_pattern": {"0": 16}}, {}, {OUT0: 4}),
  "a module that holds it": ({"alpha_pattern": {"attn1": 16}}, {}, {}),
  "a point is any letter": ({"alpha_pattern": {"to.out.0": 16}}, {}, {OUT0: 4}),
  "overlapping": (
    {"alpha_pattern": {"to_q": 16, Q1: 2, ".*": 8}},
    {},
    {Q0: 2, K0: 2, V0: 2, OUT0: 2, Q1: 2, Q10: 2},
  ),
  "overlapping, sorted by the writer": (
    {"alpha_pattern": {Q1: 2, "to_q": 16}},
    {},
    {Q0: 4, Q1: 4, Q10: 4},
  ),
  "ranks": ({"lora_alpha": 8, "rank_pattern": {r"to_[kv]": 2}}, {K0: 2, V0: 2}, {
    Q0: 2, K0: 4, V0: 4, OUT0: 2, Q1: 2, Q10: 2,
  }),
  "ranks and alphas": (
    {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 2}}, {K0: 2}, {},
  ),
  "rslora": (
    {"use_rslora": True, "rank_pattern": {"to_v": 1}, "alpha_pattern": {"to_out.0": 16}},
    {V0: 1},
    {Q0: 2, K0: 2, V0: 4, OUT0: 8, Q1: 2, Q10: 2},
  ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "ranks", "scales"), PEFTS.values(), ids=PEFTS)
def test_scales_are_those_of_peft(tmp_path, changes, ranks, scales):
  found = lora.read(write(tmp_path / "a.safetensors", header(**changes), ranks))
  expected = {**dict.fromkeys(MODULES, 1.0), **scales}
  assert {module: update.scale for module, update in found.items()} == expected


def test_pefts_own_folder_says_its_scales_in_the_config_beside_it(tmp_path):
  named = {n.replace("transformer.", "base_model.model.", 1): x for n, x in matrices().items()}
  save_file(named, tmp_path / "adapter_model.safetensors")
  fields = {**WRITTEN, "alpha_pattern": {r"attn1\.to_(q|k)": 16}}
  (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
  found = lora.read(tmp_path)
  assert (found[Q1].scale, found[V0].scale) == (4, 1)
  (tmp_path / "adapter_config.json").write_text("{")
  with pytest.raises(UserError, match=r"adapter_config.json is not JSON"):
    lora.read(tmp_path)


def test_without_a_header_the_scale_is_one_unless_alpha_is_given(tmp_path):
  path = write(tmp_path / "a.safetensors", ranks={Q1: 2})
  assert {update.scale for update in lora.read(path).values()} == {1}
  scales = {module: update.scale for module, update in lora.read(path, alpha=8).items()}
  assert scales == {**dict.fromkeys(MODULES, 2), Q1: 4}


def test_tensors_of_alpha_count(tmp_path):
  alphas = {Q0: 2, K0: 0}  # Of the others it is the rank, and so it is where it is 0: kohya.
  more = {f"transformer.{module}.alpha": np.array(x, np.float32) for module, x in alphas.items()}
  found = lora.read(write(tmp_path / "a.safetensors", **more))
  assert {m: u.scale for m, u in found.items()} == {**dict.fromkeys(MODULES, 1.0), Q0: 0.5}
  with pytest.raises(UserError, match="say another scale than PEFT's fields"):
    lora.read(write(tmp_path / "b.safetensors", header(), **more))


def test_an_alpha_that_the_file_says_is_not_given_again(tmp_path):
  with pytest.raises(UserError, match="says its alpha itself: leave --lora_alpha=8 out"):
    lora.read(write(tmp_path / "a.safetensors", header()), alpha=8)


@pytest.mark.parametrize("alpha", [0, -4, float("nan")])
def test_an_alpha_that_is_not_above_zero_is_refused(tmp_path, alpha):
  with pytest.raises(UserError, match=r"--lora_alpha=\S+ must be above 0"):
    lora.read(write(tmp_path / "a.safetensors"), alpha=alpha)


def test_a_file_of_sat_asks_for_alpha(tmp_path):
  path = tmp_path / "a.safetensors"
  halves = {"A": np.ones((4, WIDTH), np.float32), "B": np.ones((WIDTH, 4), np.float32)}
  save_file({SAT_NAME.format(part): x for part, x in halves.items()}, path)
  assert lora.read(path, alpha=2)[Q0].scale == 0.5
  with pytest.raises(UserError, match=r"alpha / 4\.\nGive --lora_alpha=ALPHA"):
    lora.read(path, must_know_alpha=True)
  with pytest.warns(UserWarning, match=r"--lora_alpha=ALPHA.*\n?.*Taken at scale 1"):
    assert lora.read(path)[Q0].scale == 1


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"lora_alpha": None}, "lora_alpha is None, not a number"),
    ({"lora_alpha": "8"}, "lora_alpha is '8', not a number"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan, not a number"),
    ({"alpha_pattern": {"to_q": None}}, "alpha_pattern 'to_q' is None, not a number"),
    ({"alpha_pattern": ["to_q"]}, "must map patterns to numbers"),
    ({"alpha_pattern": {"to_(q": 2}}, r"'to_\(q', no regular expression"),
    ({"r": 8}, "says rank 8 for .*, whose matrices have rank 4"),
    ({"rank_pattern": {"to_q": 2}}, "says rank 2 for .*to_q, whose matrices have rank 4"),
    ({"use_dora": True}, "says use_dora"),
    ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
    ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights"),
  ],
)
def test_a_header_that_cannot_be_followed_is_refused(tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    lora.read(write(tmp_path / "a.safetensors", header(**changes)))


@pytest.mark.parametrize(
  ("text", "message"), [("{oops", "is not JSON"), ("[1]", "must be one JSON object")]
)
def test_a_header_that_is_no_json_object_is_refused(tmp_path, text, message):
  with pytest.raises(UserError, match=f"lora_adapter_metadata in the header of .* {message}"):
    lora.read(write(tmp_path / "a.safetensors", {"lora_adapter_metadata": text}))
