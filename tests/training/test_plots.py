"""The pictures: written whole, with the curves and cells the numbers ask for."""

import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from moe_peft.training.display.plots import moving_average, plot_expert_load, plot_loss_curves
from moe_peft.training.folder.metrics import EvalMetrics, ExpertMetrics, JobMetrics, MetricsWriter, StepMetrics


@pytest.fixture
def figures(monkeypatch):
    """The figures saved during the test, to look at what was drawn rather than at pixels."""
    saved = []
    savefig = Figure.savefig

    def remember(figure, *args, **kwargs):
        saved.append(figure)
        return savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return saved


def write_run(path, losses, eval_losses=(), aux_loss=0.0):
    """One adapter a key; ``losses[name][i]`` is the loss of step i + 1."""
    with MetricsWriter(path) as writer:
        for name, values in losses.items():
            for step, loss in enumerate(values, start=1):
                writer.take(
                    StepMetrics(
                        adapter=name,
                        step=step,
                        num_steps=len(values),
                        epoch=0.0,
                        loss=loss,
                        aux_loss=aux_loss,
                        lr=1e-3,
                        grad_norm=1.0,
                        num_supervised_tokens=1,
                        num_tokens=1,
                        seconds=1.0,
                        tokens_per_second=1.0,
                    )
                )
        for name, step, loss in eval_losses:
            writer.take(EvalMetrics(adapter=name, step=step, eval_loss=loss, num_supervised_tokens=1))


def curves(axis):
    return {line.get_label(): line for line in axis.lines}


def png_size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.rstrip().endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_short_runs_show_every_step_and_the_held_out_points(tmp_path, figures):
    losses = {"qa": [3.0, 2.0, float("nan"), 1.0], "home": [2.5, 1.5]}
    write_run(tmp_path / "m.jsonl", losses, [("qa", 0, 3.2), ("qa", 4, 1.1)])
    plot_loss_curves(tmp_path / "m.jsonl", tmp_path / "loss.png")
    assert min(png_size(tmp_path / "loss.png")) > 400
    (axis,) = figures[0].axes
    drawn = curves(axis)
    assert set(drawn) == {"qa: training", "qa: held-out", "home: training"}
    np.testing.assert_array_equal(drawn["qa: training"].get_ydata(), losses["qa"])
    np.testing.assert_array_equal(drawn["qa: training"].get_xdata(), [1, 2, 3, 4])
    np.testing.assert_array_equal(drawn["qa: held-out"].get_xydata(), [[0, 3.2], [4, 1.1]])
    assert drawn["qa: training"].get_color() == drawn["qa: held-out"].get_color()
    assert drawn["qa: training"].get_color() != drawn["home: training"].get_color()
    assert "average" not in axis.get_title()


def test_long_runs_are_smoothed_and_say_so(tmp_path, figures):
    losses = np.linspace(3.0, 1.0, 200).tolist()
    write_run(tmp_path / "m.jsonl", {"qa": losses})
    plot_loss_curves(tmp_path / "m.jsonl", tmp_path / "loss.png")
    (axis,) = figures[0].axes
    assert "exponential moving average over 8 steps" in axis.get_title()
    raw = next(line for line in axis.lines if line.get_alpha() is not None)
    np.testing.assert_array_equal(raw.get_ydata(), losses)


def test_router_losses_get_their_own_axis(tmp_path, figures):
    write_run(tmp_path / "m.jsonl", {"qa": [3.0, 2.0]}, aux_loss=0.25)
    plot_loss_curves(tmp_path / "m.jsonl", tmp_path / "loss.png")
    _, aux_axis = figures[0].axes
    np.testing.assert_array_equal(curves(aux_axis)["qa"].get_ydata(), [0.25, 0.25])


def test_twenty_adapters_keep_their_legend_inside_the_picture(tmp_path, figures):
    losses = {f"customer-{i:02d}": [3.0, 2.0, 1.0] for i in range(20)}
    write_run(tmp_path / "m.jsonl", losses, [(name, 3, 1.5) for name in losses])
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        writer.take(JobMetrics(adapter="refused-one", state="refused"))
        writer.take(ExpertMetrics(adapter="customer-00", step=3, counts=((1, 2),)))
    plot_loss_curves(tmp_path / "m.jsonl", tmp_path / "loss.png")
    (figure,) = figures
    (axis,) = figure.axes
    assert len(curves(axis)) == 40 and not any("refused" in label for label in curves(axis))
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1 and figure.bbox.y0 <= legend.y0
    assert legend.x0 >= axis.get_window_extent().x1 > 0.5 * figure.bbox.x1


def test_a_run_without_steps_still_has_a_picture(tmp_path):
    (tmp_path / "m.jsonl").write_text("", encoding="utf-8")
    plot_loss_curves(tmp_path / "m.jsonl", tmp_path / "loss.png")
    assert min(png_size(tmp_path / "loss.png")) > 400


def test_moving_average_equals_its_definition():
    values = np.array([4.0, np.nan, 2.0, 8.0])
    keep = 1 - 2 / (5 + 1)
    expected = [4.0, 4.0, (4 * keep + 2) / (keep + 1), (4 * keep**2 + 2 * keep + 8) / (keep**2 + keep + 1)]
    np.testing.assert_allclose(moving_average(values, 5), expected, rtol=1e-12)
    assert np.isnan(moving_average(np.array([np.nan]), 5)).all()


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (30, 8), (3, 64)])
def test_expert_load_shows_every_share_around_balance(tmp_path, figures, layers, experts):
    load = np.random.default_rng(0).dirichlet(np.ones(experts), layers)
    plot_expert_load(load, tmp_path / "load.png", "home-moe")
    assert min(png_size(tmp_path / "load.png")) > 300
    axis, bar = figures[0].axes
    (image,) = axis.images
    np.testing.assert_array_equal(image.get_array(), load)
    assert image.norm.vcenter == pytest.approx(1 / experts) and image.norm.vmin == 0
    assert "home-moe" in axis.get_title()
    assert f"{100 / experts:.3g}% balanced" in [label.get_text() for label in bar.get_yticklabels()]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("expert", "layer")


def test_a_collapsed_layer_is_drawn_and_one_without_tokens_left_blank(tmp_path, figures):
    plot_expert_load(np.array([[1.0, 0.0, 0.0, 0.0], [np.nan] * 4]), tmp_path / "load.png", "qa")
    assert png_size(tmp_path / "load.png")
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["100", "0", "0", "0"]


def test_nothing_global_is_touched(tmp_path):
    settings, had_pyplot = matplotlib.rcParams.copy(), "matplotlib.pyplot" in sys.modules
    plot_expert_load(np.full((2, 2), 0.5), tmp_path / "load.png", "qa")
    assert matplotlib.rcParams.copy() == settings
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot
