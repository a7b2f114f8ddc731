"""The one style of all pictures, from plain numbers to a PNG file. matplotlib loads with the first one."""

import contextlib

DPI = 150
PANEL = (5.0, 3.6)  # inches

# Okabe and Ito's colours, which colour-blind eyes tell apart; markers and dashes do so without any colour.
TRAINED = dict(color="#0072B2", marker="o")
TRAINING_DATA = dict(color="#CC79A7", marker="s")
UNTRAINED = dict(color="#D55E00", marker="^", linestyle="--")
COUNTED = dict(color="#009E73", marker="D", linestyle="-.")
REFERENCE = dict(color="#666666", linestyle=":", linewidth=1.5)
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "legend.edgecolor": "none",
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
}


@contextlib.contextmanager
def figure(path, rows, columns):
    """Panels to draw on, [rows][columns]; at the end they are written to the path."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which would choose a screen and keep every figure

    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(columns * PANEL[0], rows * PANEL[1]), layout="constrained")
        yield drawing.subplots(rows, columns, squeeze=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path, dpi=DPI)


def logarithmic(panel, axes):
    """Logarithmic axes, "x", "y" or "xy", with labels at 1, 2, 5, 10 and so on."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for name in axes:
        panel.set(**{f"{name}scale": "log"})
        axis = getattr(panel, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
