"""The v loss: what counts, what it equals, and that packing changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import v_loss

from cogvideox_jax.diffusion import objective as objectives
from cogvideox_jax.diffusion.latents import LatentConfig, Latents
from cogvideox_jax.diffusion.noise import NoiseConfig, noise_schedule, x0_from_v
from cogvideox_jax.diffusion.objective import Objective, draw_timesteps
from cogvideox_jax.types import TEXT, VISION, Batch

SCHEDULE = noise_schedule(NoiseConfig(1000, 0.00085, 0.012, 3.0, zero_terminal_snr=True))
P, L = 4, 2  # Numbers in a patch; text tokens of a clip.
PLAIN = LatentConfig(patch=(1, 2, 2), scaling_factor=1.0, image_scale=1.0, image_drop_rate=0.0)


def packed(*rows, n, slots=4):
  """A batch whose rows hold clips of these numbers of vision tokens. Latents are drawn."""
  rng = np.random.default_rng(0)
  segment_ids = np.zeros((len(rows), n), np.int32)
  experts = np.full((len(rows), n), VISION, np.int32)
  for r, lengths in enumerate(rows):
    at = 0
    for segment, length in enumerate(lengths, start=1):
      segment_ids[r, at : at + L + length] = segment
      experts[r, at : at + L] = TEXT
      at += L + length
  is_vision = ((segment_ids > 0) & (experts == VISION))[..., None]
  return Batch(
    mean=rng.normal(size=(len(rows), n, P)).astype(np.float32) * is_vision,
    logvar=rng.normal(size=(len(rows), n, P)).astype(np.float32) * is_vision,
    text=np.zeros((len(rows), slots, L, 3), np.float32),
    segment_ids=segment_ids,
    experts=experts,
    coordinates=np.zeros((len(rows), n, 3), np.int32),
    grids=np.ones((len(rows), slots + 1, 3), np.int32),
  )


def network(x, timesteps):
  """Any function of its inputs will do."""
  return jnp.sin(x) + timesteps.mean() / 1000


def loss_of(denoise, timed, key, latents=PLAIN):
  count = objectives.counted(timed.batch, "tokens")
  return objectives.loss_share(objective(latents), denoise, timed, count, key)


def objective(latents=PLAIN, explicit_uniform=True):
  return Objective(SCHEDULE, latents, explicit_uniform, "tokens")


def draws(batch):
  """Latents, and timesteps [b s], for a batch."""
  x0, noise = jax.random.normal(jax.random.key(0), (2, *batch.mean.shape))
  timesteps = jax.random.randint(jax.random.key(1), batch.grids.shape[:2], 0, 1000)
  return Latents(x0, noise, None), timesteps


def test_equals_the_published_weighting_of_the_error_of_x0():
  batch = packed([3, 5], [6], n=14)
  latents, timesteps = draws(batch)
  timesteps = timesteps.at[0, 1].set(999)  # Where alpha is 0; there the published weight is 1.
  seen = []

  def denoise(x, timesteps):
    seen.append((x, v := network(x, timesteps)))
    return v

  ours = v_loss(denoise, latents, timesteps, batch, SCHEDULE)
  x, v = seen[0]
  alpha = SCHEDULE.alphas_cumprod[np.take_along_axis(np.asarray(timesteps), batch.segment_ids, 1)]
  alpha = alpha[..., None].astype(np.float32)
  squares = np.square(x0_from_v(x, v, jnp.asarray(alpha)) - latents.x0) / (1 - alpha)
  counts = (batch.segment_ids > 0) & (batch.experts == VISION)
  np.testing.assert_allclose(ours, squares[counts].mean(), rtol=1e-3)


def test_the_true_velocity_has_no_loss_at_any_timestep():
  batch = packed([3, 5], [6], n=14)
  latents, timesteps = draws(batch)
  timesteps = timesteps.at[:, 1].set(999)
  alpha = jnp.take_along_axis(SCHEDULE.alpha(timesteps), batch.segment_ids, axis=1)[..., None]
  truth = jnp.sqrt(alpha) * latents.noise - jnp.sqrt(1 - alpha) * latents.x0
  assert v_loss(lambda x, t: truth, latents, timesteps, batch, SCHEDULE) < 1e-12
  assert v_loss(lambda x, t: truth + 0.5, latents, timesteps, batch, SCHEDULE) == pytest.approx(
    0.25, rel=1e-4
  )


def test_text_and_padding_count_nothing_even_when_not_a_number():
  batch = packed([3, 5], [6], n=14)
  latents, timesteps = draws(batch)
  counts = jnp.asarray((batch.segment_ids > 0) & (batch.experts == VISION))[..., None]

  def at(scale, elsewhere):
    def denoise(x, _):
      return jnp.where(counts, scale * jnp.sin(x), elsewhere)

    return v_loss(denoise, latents, timesteps, batch, SCHEDULE)

  expected = jax.value_and_grad(at)(1.5, 0.0)
  np.testing.assert_array_equal(jax.value_and_grad(at)(1.5, jnp.nan), expected)
  assert expected[1] != 0


@pytest.mark.parametrize("weighting", ["clips", "tokens"])
def test_packed_clips_give_the_weighted_loss_of_the_clips_alone(weighting):
  batch = packed([3, 5], n=14)
  latents, timesteps = draws(batch)
  together = v_loss(lambda x, _: jnp.sin(x), latents, timesteps, batch, SCHEDULE, weighting)
  alone = []
  for segment, tokens in [(1, np.s_[0:5]), (2, np.s_[5:12])]:
    clip = packed([tokens.stop - tokens.start - L], n=tokens.stop - tokens.start, slots=1)
    steps = timesteps[:, jnp.array([0, segment])]
    mine = Latents(latents.x0[:, tokens], latents.noise[:, tokens], None)
    # A mean over the tokens of one clip, by whatever a batch of several is weighed.
    alone.append(v_loss(lambda x, _: jnp.sin(x), mine, steps, clip, SCHEDULE, "tokens"))
  weights = {"clips": (1 / 2, 1 / 2), "tokens": (3 / 8, 5 / 8)}[weighting]
  np.testing.assert_allclose(together, np.dot(weights, alone), rtol=1e-6)
  assert abs(alone[0] - alone[1]) > 0.01 * alone[0]


@pytest.mark.parametrize("weighting", ["clips", "tokens"])
def test_rows_of_a_batch_add_up_to_its_loss(weighting):
  batch, key = packed([3, 5], [6], [1, 1, 2], [], n=20), jax.random.key(4)
  whole = objective()._replace(weighting=weighting)
  timed = draw_timesteps(whole, batch, key)
  count = objectives.counted(batch, weighting)
  assert count == {"clips": 6, "tokens": 18}[weighting]

  def share(rows):
    part = jax.tree.map(lambda x: x[rows], timed)
    return objectives.loss_share(whole, lambda x, _: jnp.sin(x), part, count, key)

  shares = [share(np.array(rows)) for rows in ([0, 2], [1], [3])]
  np.testing.assert_allclose(sum(shares), share(np.arange(4)), rtol=1e-6)


def shown(batch, timestep, latents):
  """What the network is shown [keys b n p] with each of many keys."""

  def noised(key):
    seen = []
    loss_of(lambda x, _: seen.append(x) or x, objectives.at_timestep(batch, timestep), key, latents)
    return seen[0]

  return jax.jit(jax.vmap(noised))(jax.random.split(jax.random.key(0), 4000))


def test_latents_are_drawn_from_the_scaled_posterior_and_noise_is_standard():
  batch = packed([3], n=5)
  batch = batch._replace(logvar=batch.logvar.clip(-1, 1))
  alpha = SCHEDULE.alphas_cumprod[0]
  tokens = np.s_[:, 0, L:]
  scaled = PLAIN._replace(scaling_factor=0.7)
  signal, noise = (shown(batch, t, scaled)[tokens] for t in (0, 999))
  mean = 0.7 * np.sqrt(alpha) * batch.mean[0, L:]
  variance = 0.49 * alpha * np.exp(batch.logvar[0, L:]) + 1 - alpha
  np.testing.assert_allclose(signal.mean(0), mean, atol=0.08)
  np.testing.assert_allclose(signal.var(0), variance, rtol=0.15)
  np.testing.assert_allclose(noise.mean(0), 0, atol=0.08)
  np.testing.assert_allclose(noise.var(0), 1, rtol=0.15)


@pytest.mark.parametrize("explicit", [True, False])
def test_each_clip_is_noised_to_its_own_timestep(explicit):
  batch = packed([3, 5, 2], [6], n=20)
  seen = []

  def denoise(x, timesteps):
    seen.append(timesteps)
    return x

  key = jax.random.key(2)
  loss_of(denoise, draw_timesteps(objective(explicit_uniform=explicit), batch, key), key)
  timesteps = np.asarray(seen[0])
  assert timesteps.shape == (2, 5)
  assert (timesteps[0, 1:4] > 0).all()
  assert len(set(timesteps[0, 1:4])) == 3
  assert not timesteps[:, 0].any()
  assert not timesteps[1, 2:].any()
  halves = {*(timesteps[0, 1:4] // 500), 2 + timesteps[1, 1] // 500}
  assert halves in ({0, 3}, {1, 2}) or not explicit


def test_the_loss_follows_the_key_alone():
  batch = packed([3, 5], [6], n=14)

  @jax.jit
  def draw(key):
    return loss_of(network, draw_timesteps(objective(), batch, key), key)

  first = draw(jax.random.key(0))
  assert first == draw(jax.random.key(0))
  assert first != draw(jax.random.key(1))
  at_two_timesteps = [
    loss_of(network, objectives.at_timestep(batch, t), jax.random.key(0)) for t in (100, 900)
  ]
  assert at_two_timesteps[0] != at_two_timesteps[1]
