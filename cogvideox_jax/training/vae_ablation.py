"""Trains the variants of an ablation of the VAE with several seeds, and scores them.

Each run has a workdir, ABLATION/SET/VARIANT/seed_N, so that an ablation goes on where it stopped.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
from etils import epath

from cogvideox_jax.config.ablation_schema import VAEAblationConfig
from cogvideox_jax.config.checks import check_values
from cogvideox_jax.config.vae_schema import VAETrainConfig
from cogvideox_jax.data import measured_clips
from cogvideox_jax.data.buckets import Bucket
from cogvideox_jax.data.decoding import Decoders
from cogvideox_jax.data.measured_clips import MeasuredClips
from cogvideox_jax.errors import UserError
from cogvideox_jax.evaluation import scored_clips, vae_table
from cogvideox_jax.evaluation.clip_scores import Judges
from cogvideox_jax.evaluation.reconstruction import open_vae
from cogvideox_jax.evaluation.seed_statistics import Claim, Verdict, judge, summarize
from cogvideox_jax.evaluation.vae_table import Row, Setting
from cogvideox_jax.interrupts import recorded
from cogvideox_jax.training import checkpoint, resume, vae_clips, vae_run, vae_stages
from cogvideox_jax.training.session import say

EMBEDDED = "clips"  # The folder of the embedded clips in the workdir.
COMPILED = "compiled"  # The folder of compiled programs, which the seeds of a variant share.


class Run(NamedTuple):
  """A training of one variant, on one set of clips, with one seed."""

  clips: str  # The set's name.
  variant: str
  seed: int

  def workdir(self, ablation: epath.Path) -> epath.Path:
    return ablation / self.clips / self.variant / f"seed_{self.seed}"


class Table(NamedTuple):
  """What an ablation finds."""

  rows: list[Row]  # One for each variant on each set: means over seeds, with deviations.
  verdicts: list[tuple[str, Verdict]]  # With the set's name.


def check(config: VAEAblationConfig) -> None:
  """Raises a UserError for a config that cannot be run, before anything is trained."""
  check_values(config)
  for name in (EMBEDDED, COMPILED):
    if name in config.sets:
      raise UserError(f"config.sets.{name}: that folder of the workdir has another use; rename it.")
  if len(set(config.seeds)) != len(config.seeds):
    raise UserError(f"config.seeds is {config.seeds}; each seed may stand there once.")
  training = config.training
  if training.stages:
    raise UserError("config.training.stages: the runs of an ablation have one stage. Remove them.")
  if not training.validation.every or not training.data.validation_fraction:
    raise UserError(
      "The variants are scored on files that the training holds out.\n"
      "Set config.training.data.validation_fraction and validation.every above 0."
    )
  for name, claim in config.claims.items():
    for variant in (claim.lower, claim.higher):
      if variant not in config.variants:
        raise UserError(
          f"config.claims.{name} names {variant!r}, which is no variant.\n"
          f"There are: {', '.join(config.variants)}"
        )
  for variant in config.variants:
    vae_stages.check(config.run(variant, config.seeds[0], ""))


def runs(config: VAEAblationConfig) -> Iterator[Run]:
  """Yields all runs; those of the first seed come first."""
  for seed in config.seeds:
    for clips in config.sets:
      for variant in config.variants:
        yield Run(clips, variant, seed)


def train(config: VAEAblationConfig, workdir: epath.Path) -> int:
  """Trains all runs that are not finished; each goes on from its newest good checkpoint.

  Returns:
    The exit code: 0, or after a signal the signal's.

  Raises:
    UserError: the config, the clips or the workdir do not allow it.
  """
  if jax.config.values["jax_compilation_cache_dir"] is None:
    jax.config.update("jax_compilation_cache_dir", str(workdir / COMPILED))
  everything = list(runs(config))
  with recorded() as signals:
    for number, run in enumerate(everything, 1):
      settings = config.run(run.variant, run.seed, source(config, run.clips, workdir))
      folder = run.workdir(workdir)
      if _is_finished(settings, folder):
        continue
      say(f"run {number} of {len(everything)}: {run.variant} on {run.clips}, seed {run.seed}")
      if exit_code := vae_run.train(settings, folder) or next(iter(signals), 0):
        return exit_code
      jax.clear_caches()  # The programs of a run would stay in memory until the process ends.
  return 0


def _is_finished(config: VAETrainConfig, workdir: epath.Path) -> bool:
  """Returns whether a run has taken all its steps and written its VAE.

  The VAE of fewer steps is removed, so that it is never taken for that of a run lengthened since.

  Raises:
    UserError: the workdir was begun with another config.
  """
  resume.check_config(workdir, config)
  vae = workdir / "vae"
  if checkpoint.good_steps(workdir / "checkpoints")[-1:] == [config.train.steps]:
    return vae.exists()
  if vae.exists():
    vae.rmtree()
  return False


def source(config: VAEAblationConfig, clips: str, workdir: epath.Path) -> str:
  """Returns the manifest or folder of a set of clips, which is rendered if it has none."""
  return config.sets[clips].path or vae_clips.render(config.training, workdir / EMBEDDED)


def score(
  config: VAEAblationConfig,
  workdir: epath.Path,
  judges: Judges,
  decoders: Decoders,
  *,
  every_window: bool,
  biased: bool,
) -> Table:
  """Scores all runs on the held-out files of their sets.

  Raises:
    UserError: a run is not finished; or a set holds no clip out.
  """
  windows = "windows" if every_window else "first frames"
  bucket = bucket_of(config)
  setting = Setting(
    bucket.num_frames, bucket.height, bucket.width, config.training.data.fps, windows, biased
  )
  rows, verdicts = [], []
  for clips in config.sets:
    held_out = _held_out(config, source(config, clips, workdir), decoders)
    batches = scored_clips.decode(held_out, bucket, decoders, every_window=every_window)
    chosen = [run for run in runs(config) if run.clips == clips]
    vaes = [open_vae(str(run.workdir(workdir))) for run in chosen]
    found = vae_table.compare(vaes, batches, judges, setting)
    by_variant: dict[str, list[Row]] = {variant: [] for variant in config.variants}
    for run, row in zip(chosen, found, strict=True):
      by_variant[run.variant].append(row)
    rows += [vae_table.over_seeds(f"{clips}/{variant}", of) for variant, of in by_variant.items()]
    verdicts += [(clips, verdict) for verdict in _verdicts(config, by_variant)]
  return Table(rows, verdicts)


def bucket_of(config: VAEAblationConfig) -> Bucket:
  """Returns the bucket of the scored clips: the training's longest, of its first size."""
  data = config.training.data
  height, width = data.sizes[0]
  return Bucket(max(data.durations), height, width)


def _held_out(config: VAEAblationConfig, clips: str, decoders: Decoders) -> MeasuredClips:
  """Returns the files that no run was trained on; their clips have the size and length scored."""
  data, bucket = config.training.data, bucket_of(config)
  measured = measured_clips.measure(
    clips,
    [(bucket.height, bucket.width)],
    [bucket.num_frames],
    data.fps,
    decoders,
    subfolders=data.subfolders,
    allow_links=data.allow_links,
  )
  held_out = measured.split(data.validation_fraction)[1]
  if not held_out.num_clips:
    raise UserError(
      f"{clips}: no file of {bucket.num_frames} frames is held out, so there is nothing "
      "to score.\nRaise config.training.data.validation_fraction, or give more files."
    )
  return held_out


def _verdicts(config: VAEAblationConfig, rows: Mapping[str, Sequence[Row]]) -> Iterator[Verdict]:
  """Judges the claims whose score there is."""
  for claim in config.claims.values():
    scores = {
      variant: [row[claim.score] for row in rows[variant]]
      for variant in (claim.lower, claim.higher)
    }
    if not any(score is None for of in scores.values() for score in of):
      summaries = {variant: summarize(of) for variant, of in scores.items()}
      yield judge(Claim(claim.lower, claim.higher, claim.score), summaries)
