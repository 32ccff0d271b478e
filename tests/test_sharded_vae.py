"""Clips whose frames devices share: the numbers and gradients of one device, and what is sent."""

import dataclasses
import math
import re
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import VAE_CONFIG, draw
from flax import nnx
from jaxtyping import Array

from cogvideox_jax import sharding
from cogvideox_jax.aot import hlo, work
from cogvideox_jax.errors import UserError
from cogvideox_jax.models import vae
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.vae import VAE
from cogvideox_jax.models.vae_context import Split
from cogvideox_jax.sharded_vae import SharedClips, share_clips

# As few layers as compile soon, of every kind.
SMALL = dataclasses.replace(
  VAE_CONFIG, channels=(4, 4), latent_channels=2, resnets=0, temporal_compression=2
)
RULES = sharding.rules_named("fsdp")
CLIPS, COUNT, SIDE = 2, 17, 8


def mesh_of(data: int, context: int):
  sizes = {"data": data, "fsdp": 1, "context": context, "tensor": 1}
  return sharding.make_mesh(sizes, jax.devices()[: data * context])


class Outcome(NamedTuple):
  mean: Array
  restored: Array
  loss: Array
  grads: Any  # Of the parameters, and of the frames.
  text: str  # The compiled program.


def outcome(config, count, plan, data, context, *, remat=False) -> Outcome:
  """Reconstructs the same clips with the same weights on a mesh."""
  graph, params = graph_of(VAE, config, remat=remat), draw(VAE, config)[1]
  frames = jax.random.normal(jax.random.key(0), (CLIPS, count, SIDE, SIDE, 3))
  noise = jax.random.normal(jax.random.key(1), (CLIPS, -(-count // config.temporal_compression), 1))
  mesh = mesh_of(data, context)
  clips = share_clips(mesh, RULES, config.temporal_compression, count, plan=plan)

  def loss_of(params, frames, noise):
    model = nnx.merge(graph, params)
    frames = clips.spread(frames)
    mean, logvar = clips.encode(model, frames)
    noise = jnp.broadcast_to(clips.spread_latents(noise), mean.shape)
    restored = clips.decode(model, vae.sample_posterior(mean, logvar, noise))
    loss = clips.mean(jnp.square(restored - frames)) + clips.mean_of_latents(logvar**2)
    return loss, (mean, restored)

  noise = noise[..., None, None]
  rows = sharding.row_sharding(mesh, RULES, CLIPS)
  given = jax.device_put((params, frames, noise), (sharding.replicated(mesh), rows, rows))
  if data * context == 1:  # The VAE jits its chunks, of which long clips have many.
    (loss, (mean, restored)), grads = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(*given)
    return Outcome(mean, restored, loss, grads, "")
  program = jax.jit(jax.value_and_grad(loss_of, (0, 1), has_aux=True)).lower(*given).compile()
  (loss, (mean, restored)), grads = jax.block_until_ready(program(*given))
  return Outcome(
    clips.whole_latents(mean), clips.whole(restored), loss, grads, program.as_text() or ""
  )


def check_same(shared: Outcome, alone: Outcome) -> None:
  compare = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(compare, jax.device_get(shared[:-1]), jax.device_get(alone[:-1]))


@pytest.fixture(scope="module")
def alone():
  return outcome(SMALL, COUNT, "diffusers", 1, 1)


@pytest.fixture(scope="module")
def shared():
  """On four devices a clip: three have latent frames, and the second has some of two chunks."""
  return outcome(SMALL, COUNT, "diffusers", 2, 4, remat=True)


def test_frames_and_gradients_are_those_of_one_device_with_uneven_chunks_and_recomputation(
  shared, alone
):
  assert alone.restored.shape[1] == COUNT
  assert all((np.abs(leaf).max() > 1e-4) for leaf in jax.tree.leaves(alone.grads))
  check_same(shared, alone)


def test_the_plan_of_chunks_is_part_of_the_numbers(alone):
  graph, params = graph_of(VAE, SMALL), draw(VAE, SMALL)[1]
  frames = jax.random.normal(jax.random.key(0), (CLIPS, COUNT, SIDE, SIDE, 3))

  def mean_on(context):
    clips = share_clips(mesh_of(1, context), RULES, 2, COUNT, plan="sat")

    @jax.jit
    def mean(params, frames):
      return clips.encode(nnx.merge(graph, params), clips.spread(frames))[0]

    return np.asarray(clips.whole_latents(jax.block_until_ready(mean(params, frames))))

  found = mean_on(2)
  np.testing.assert_allclose(found, mean_on(1), rtol=1e-5, atol=1e-5)
  assert np.abs(found - np.asarray(alone.mean)).max() > 1e-3


def arrays_sent(text: str) -> dict[str, list[int]]:
  """Bytes of each array that a collective of the program gives, by kind of the collective."""
  kinds, found = "|".join(hlo.COLLECTIVES), {}
  for line in text.splitlines():
    if match := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
      for sizes in re.findall(r"f32\[([\d,]*)\]", match[1]):
        numbers = math.prod(int(size) for size in sizes.split(",") if size)
        found.setdefault(match[2], []).append(4 * numbers)
  return found


def test_no_activation_is_gathered_and_only_two_frames_of_it_are_sent(shared):
  sent = arrays_sent(shared.text)
  assert sent.keys() == {"collective-permute", "all-reduce"}
  two_frames = 4 * 2 * SIDE * SIDE * 4  # Of 4 channels, in float32.
  assert max(sent["collective-permute"]) == two_frames
  # The largest sums are the gradients of kernels, and of the frames that all devices hold.
  kernel, clip = 4 * 27 * 4 * 4, 4 * COUNT * SIDE * SIDE * 3
  assert {size for size in sent["all-reduce"] if size > kernel} <= {clip}


published = cache(partial(outcome, VAE_CONFIG, data=1))


@pytest.mark.slow
@pytest.mark.parametrize("context", [8, 4, 2])
@pytest.mark.parametrize(("count", "plan"), [(161, "sat"), (17, "diffusers"), (1, "diffusers")])
def test_clips_of_the_published_stages_are_exact(count, plan, context):
  alone = published(count=count, plan=plan, context=1)
  check_same(published(count=count, plan=plan, context=context), alone)


@pytest.mark.parametrize(
  ("count", "plan", "what"),
  [(16, "diffusers", "16 frames"), (13, "diffusers", "4 latent frames"), (137, "sat", "35 latent")],
)
def test_chunks_that_devices_cannot_share_are_refused(count, plan, what):
  with pytest.raises(UserError, match=rf"^{what}.* 2 devices"):
    share_clips(mesh_of(1, 2), RULES, 4, count, plan=plan)
  assert share_clips(mesh_of(2, 1), RULES, 4, 16).encoding.ranks == 1


def test_devices_may_share_the_height_of_a_clip_and_gather_none_of_it():
  graph, params = graph_of(VAE, SMALL), draw(VAE, SMALL)[1]
  frames = jax.random.normal(jax.random.key(0), (1, 5, 16, SIDE, 3))
  mesh = sharding.mesh_of_lines(8, jax.devices()[:2])
  assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 2}
  placed = sharding.replicated(mesh), sharding.clip_sharding(mesh, RULES)
  given = jax.device_put((params, frames), placed)
  found = vae.encode(nnx.merge(graph, given[0]), given[1])[0]
  expected = vae.encode(nnx.merge(graph, params), frames)[0]
  assert {shard.data.shape[2] for shard in found.addressable_shards} == {4}  # Of 8 lines.
  np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-5, atol=1e-5)
  program = vae.encode_chunk.lower(graph, *given, None).compile()
  sent = arrays_sent(program.as_text() or "")
  assert sent.keys() == {"collective-permute", "all-reduce"}
  line = 7 * SIDE * 4 * 4  # Of the 5 frames and the 2 before them, of 4 channels.
  assert max(sent["collective-permute"]) <= line and max(sent["all-reduce"]) <= 64


def test_the_work_of_all_devices_is_counted():
  graph, params = graph_of(VAE, SMALL), draw(VAE, SMALL)[1]
  frames = jnp.zeros((2, 7, SIDE, SIDE, 3))  # 4 latent frames, two on each device.

  def flops(data, context):
    # Chunks of whole blocks, so that no device has slots to fill.
    split = Split(("context",), context, 2, (4,))
    clips = SharedClips(mesh_of(data, context), RULES, "sat", split, split)

    def encode(params, frames):
      return clips.encode(nnx.merge(graph, params), clips.spread(frames))[0]

    return work.traced_flops(jax.make_jaxpr(encode)(params, frames))

  # Two copies of the first frame, less one, are the price of sharing.
  assert 1 < flops(2, 2) / flops(2, 1) < 8 / 7 + 0.01


@pytest.mark.slow
def test_devices_may_share_both_the_frames_and_the_height_of_a_clip():
  graph, params = graph_of(VAE, SMALL), draw(VAE, SMALL)[1]
  frames = jax.random.normal(jax.random.key(0), (1, COUNT, 16, SIDE, 3))
  sizes = {"data": 1, "fsdp": 1, "context": 2, "tensor": 2}
  mesh = sharding.make_mesh(sizes, jax.devices()[:4])
  clips = share_clips(mesh, RULES, 2, COUNT)

  def there_and_back(params, frames):
    model = nnx.merge(graph, params)
    return clips.decode(model, clips.encode(model, clips.spread(frames))[0])

  placed = sharding.replicated(mesh), sharding.clip_sharding(mesh, RULES)
  given = jax.device_put((params, frames), placed)
  program = jax.jit(there_and_back).lower(*given).compile()
  sent = arrays_sent(program.as_text() or "")
  assert sent.keys() == {"collective-permute", "all-reduce"} and max(sent["all-reduce"]) <= 128
  found = np.asarray(clips.whole(jax.block_until_ready(program(*given))))
  model = nnx.merge(graph, params)
  expected = vae.decode(model, vae.encode(model, frames)[0])
  np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-5, atol=1e-5)
