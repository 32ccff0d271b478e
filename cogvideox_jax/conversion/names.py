"""Tables of weight names: our parameters and the tensors of diffusers' and transformers' files.

Each model has one table, used for reading and writing. A row names our parameter and the file's
tensor, and gives an einops pattern from the file's axes to ours; writing reads the pattern from
right to left. Every parameter of a model and every tensor of its file must match exactly one row.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from einops import rearrange

from cogvideox_jax.models.dit_config import DiTConfig
from cogvideox_jax.models.t5 import T5Config
from cogvideox_jax.models.vae_config import VAEConfig


class Row(NamedTuple):
  """One or several parameters of a kind.

  A field such as `{i}` stands in the path and the name for the same text. `{layer}` stands in the
  name only: it counts the layers, which our parameter stacks along its first axis.
  """

  path: str  # Path of our parameter; keys are joined by "/".
  name: str  # Name of the tensor in the file.
  pattern: str  # einops: axes in the file -> our axes, without the axis of stacked layers.
  sizes: Mapping[str, int] = {}  # Sizes of the pattern's axes that the shapes do not determine.

  def to_ours(self, tensor):
    """A tensor of the file, with its axes as our parameter (of one layer) has them."""
    return rearrange(tensor, self.pattern, **self.sizes)

  def to_theirs(self, tensor):
    """Undoes `to_ours`."""
    source, target = self.pattern.split(" -> ")
    return rearrange(tensor, f"{target} -> {source}", **self.sizes)


def linear(path: str, name: str) -> tuple[Row, Row]:
  """A torch `Linear`: kernel and bias."""
  return Row(f"{path}/kernel", f"{name}.weight", "o i -> i o"), bias(path, name)


def norm(path: str, name: str) -> tuple[Row, Row]:
  """A torch `LayerNorm` or `GroupNorm`: scale and bias."""
  return Row(f"{path}/scale", f"{name}.weight", "d -> d"), bias(path, name)


def bias(path: str, name: str) -> Row:
  """The bias of a torch module."""
  return Row(f"{path}/bias", f"{name}.bias", "d -> d")


def transformer(config: DiTConfig) -> tuple[Row, ...]:
  """The table of diffusers `CogVideoXTransformer3DModel`.

  The outputs of a modulation have the same order in both: (vision, text) x (shift, scale, gate).
  """
  layer = "transformer_blocks.{layer}"
  frames, height, width = config.patch
  patch = Row("vision_in/kernel", "patch_embed.proj.weight", "d p -> p d")
  if frames == 1:  # diffusers has a 2-D convolution of each frame; for more frames, a linear layer.
    sizes = {"h": height, "w": width}
    patch = patch._replace(pattern="d c h w -> (c h w) d", sizes=sizes)

  return (
    patch,
    bias("vision_in", "patch_embed.proj"),
    *linear("text_in", "patch_embed.text_proj"),
    *linear("time_in", "time_embedding.linear_1"),
    *linear("time_out", "time_embedding.linear_2"),
    *linear("ofs_in", "ofs_embedding.linear_1"),
    *linear("ofs_out", "ofs_embedding.linear_2"),
    Row("position_table", "patch_embed.pos_embedding", "1 n d -> n d"),
    *norm("blocks/attention_norm/norm", f"{layer}.norm1.norm"),
    *linear("blocks/attention_norm/modulation", f"{layer}.norm1.linear"),
    *linear("blocks/attention/query", f"{layer}.attn1.to_q"),
    *linear("blocks/attention/key", f"{layer}.attn1.to_k"),
    *linear("blocks/attention/value", f"{layer}.attn1.to_v"),
    *norm("blocks/attention/query_norm", f"{layer}.attn1.norm_q"),
    *norm("blocks/attention/key_norm", f"{layer}.attn1.norm_k"),
    *linear("blocks/attention/out", f"{layer}.attn1.to_out.0"),
    *norm("blocks/mlp_norm/norm", f"{layer}.norm2.norm"),
    *linear("blocks/mlp_norm/modulation", f"{layer}.norm2.linear"),
    *linear("blocks/mlp/up", f"{layer}.ff.net.0.proj"),
    *linear("blocks/mlp/down", f"{layer}.ff.net.2"),
    *norm("final_norm", "norm_final"),
    *norm("out_norm", "norm_out.norm"),
    *linear("out_modulation", "norm_out.linear"),
    *linear("out", "proj_out"),
  )


def vae(config: VAEConfig) -> tuple[Row, ...]:
  """The table of diffusers `AutoencoderKLCogVideoX`.

  `up_blocks.0` is the coarsest level, as is our `up/0`.
  """

  def conv(path: str, name: str, pattern: str) -> tuple[Row, Row]:
    return Row(f"{path}/kernel", f"{name}.weight", pattern), bias(path, name)

  def causal(path: str, name: str) -> tuple[Row, Row]:
    return conv(path, f"{name}.conv", "o i t h w -> t h w i o")

  def image(path: str, name: str) -> tuple[Row, Row]:
    return conv(path, f"{name}.conv", "o i h w -> h w i o")

  def pointwise(path: str, name: str) -> tuple[Row, Row]:
    return conv(path, name, "o i 1 1 1 -> i o")

  def decoder_norm(path: str, name: str) -> tuple[Row, ...]:
    return (
      *norm(f"{path}/norm", f"{name}.norm_layer"),
      *pointwise(f"{path}/scale", f"{name}.conv_y.conv"),
      *pointwise(f"{path}/shift", f"{name}.conv_b.conv"),
    )

  def resnet(path: str, name: str, norm_rows: Callable) -> tuple[Row, ...]:
    path, name = path + "/resnets/{j}", name + ".resnets.{j}"
    return (
      *norm_rows(f"{path}/norm1", f"{name}.norm1"),
      *norm_rows(f"{path}/norm2", f"{name}.norm2"),
      *causal(f"{path}/conv1", f"{name}.conv1"),
      *causal(f"{path}/conv2", f"{name}.conv2"),
      *pointwise(f"{path}/shortcut", f"{name}.conv_shortcut"),
    )

  return (
    *causal("{side}/conv_in", "{side}.conv_in"),
    *causal("{side}/conv_out", "{side}.conv_out"),
    *resnet("encoder/down/{i}", "encoder.down_blocks.{i}", norm),
    *image("encoder/down/{i}/resample/conv", "encoder.down_blocks.{i}.downsamplers.0"),
    *resnet("encoder/mid", "encoder.mid_block", norm),
    *norm("encoder/norm_out", "encoder.norm_out"),
    *resnet("decoder/mid", "decoder.mid_block", decoder_norm),
    *resnet("decoder/up/{i}", "decoder.up_blocks.{i}", decoder_norm),
    *image("decoder/up/{i}/resample/conv", "decoder.up_blocks.{i}.upsamplers.0"),
    *decoder_norm("decoder/norm_out", "decoder.norm_out"),
  )


def text_encoder(config: T5Config) -> tuple[Row, ...]:
  """The table of transformers `T5EncoderModel`; its first layer stores the relative bias."""
  layer = "encoder.block.{layer}.layer"

  def weight(path: str, name: str, pattern: str = "o i -> i o") -> Row:
    return Row(f"blocks/{path}", f"{layer}.{name}.weight", pattern)

  return (
    Row("embedding/embedding", "shared.weight", "v d -> v d"),
    Row(
      "relative_bias/embedding",
      "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
      "buckets heads -> buckets heads",
    ),
    weight("attention_norm/scale", "0.layer_norm", "d -> d"),
    weight("attention/query/kernel", "0.SelfAttention.q"),
    weight("attention/key/kernel", "0.SelfAttention.k"),
    weight("attention/value/kernel", "0.SelfAttention.v"),
    weight("attention/out/kernel", "0.SelfAttention.o"),
    weight("mlp_norm/scale", "1.layer_norm", "d -> d"),
    weight("mlp/gate/kernel", "1.DenseReluDense.wi_0"),
    weight("mlp/up/kernel", "1.DenseReluDense.wi_1"),
    weight("mlp/down/kernel", "1.DenseReluDense.wo"),
    Row("final_norm/scale", "encoder.final_layer_norm.weight", "d -> d"),
  )
