"""Show what an evaluation found: as a table, and as a picture (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_twist.bounds import Estimate
from vllm_twist.config import PROPOSALS
from vllm_twist.evaluation.evaluator import Evaluation, PromptEvaluation


def table(found: PromptEvaluation) -> str:
    """Return the results of one prompt as text."""

    def cell(value: Estimate | None) -> str:
        return "-" if value is None else f"{value.mean:.3f} ± {value.ci95:.3f}"

    lines = [
        f"{found.prompt!r}",
        f"  log Z          {cell(found.log_z)}" + (f"  ({found.log_z_from})" if found.log_z_from else ""),
        f"  KL(q || sigma) {cell(found.kl_q_sigma)}",
        f"  KL(sigma || q) {cell(found.kl_sigma_q)}",
        f"  {found.exact_samples} exact samples from {found.draws} draws",
    ]
    if found.reason:
        lines.append(f"  {found.reason}")
    lines.append(f"  {'proposal':<9} {'K':>5}  {'resample':<8}  {'lower bound':>18}  {'upper bound':>18}  {'gap':>8}")
    for row in found.rows:
        gap = "-" if row.sandwich is None else f"{row.sandwich.gap.mean:.3f}"
        lines.append(
            f"  {row.proposal:<9} {row.particles:>5}  {'yes' if row.resample else 'no':<8}  "
            f"{cell(row.lower):>18}  {cell(row.upper):>18}  {gap:>8}"
        )
    return "\n".join(lines)


def plot(evaluation: Evaluation, path: str, known: Sequence[float | None] = ()) -> None:
    """Draw the bounds against K, a panel per prompt (of the first six), into a picture file.

    ``known`` holds log Z per panel where it is known by other means; it is drawn as a line.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ValueError("`--plot` needs matplotlib, got none: pip install 'vllm-twist[plot]'.") from error

    shown = evaluation.prompts[:6]
    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(1.2 + 4.2 * columns, 1.3 + 3.1 * lines), layout="constrained", dpi=150)
    axes = figure.subplots(lines, columns, squeeze=False)
    colours = {"twist": "#0b6e99", "base": "#c4562e"}
    names = {"twist": "twist-induced proposal", "base": "base model as proposal"}
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for panel, (axis, found) in enumerate(zip(axes.flat, shown, strict=False)):
        if found.log_z is not None:
            axis.axhspan(
                found.log_z.mean - found.log_z.ci95, found.log_z.mean + found.log_z.ci95, color="0.88", zorder=0
            )
        for proposal in PROPOSALS:
            for resample in (True, False):
                for side in ("lower", "upper"):
                    rows = [row for row in found.rows if (row.proposal, row.resample) == (proposal, resample)]
                    points = [(row.particles, getattr(row, side)) for row in rows if getattr(row, side) is not None]
                    if points:
                        axis.errorbar(
                            # Apart from each other, or equal bounds would hide one another.
                            [k * (0.96 if resample else 1.04) for k, _ in points],
                            [value.mean for _, value in points],
                            [value.ci95 for _, value in points],
                            color=colours[proposal],
                            linestyle="-" if resample else ":",
                            marker="^" if side == "lower" else "v",
                            markersize=4.5,
                            linewidth=1.3,
                            elinewidth=0.8,
                            capsize=2,
                        )
        if panel < len(known) and known[panel] is not None:
            axis.axhline(known[panel], color="0.2", linewidth=1, linestyle="--")
        axis.set_xscale("log", base=2)
        axis.set_xticks(
            sorted(set(evaluation.config.particles)), [str(k) for k in sorted(set(evaluation.config.particles))]
        )
        axis.minorticks_off()
        axis.set_title(repr(found.prompt), fontsize=9)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("particles K", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("log Z-hat (nats)", fontsize=9)
    handles = [Line2D([], [], color=colours[p], linewidth=1.3, label=names[p]) for p in PROPOSALS]
    handles += [
        Line2D([], [], color="0.3", linestyle="-", label="with resampling (SMC)"),
        Line2D([], [], color="0.3", linestyle=":", label="without (IWAE)"),
        Line2D([], [], color="0.3", linestyle="", marker="^", label="lower bound"),
        Line2D([], [], color="0.3", linestyle="", marker="v", label="upper bound"),
    ]
    if any(value is not None for value in known):
        handles.append(Line2D([], [], color="0.2", linewidth=1, linestyle="--", label="log Z, known"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, 1 + columns), fontsize=8, frameon=False)
    figure.savefig(path)
