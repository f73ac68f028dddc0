"""A line plot, drawn into a PNG file by matplotlib. No screen is needed."""

from common.errors import UserError, user_errors


def new_figure(xlabel: str, ylabel: str, title: str = ''):
    """The axes of an empty figure -> matplotlib Axes. UserError if matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('plotting needs the package matplotlib: pip install matplotlib') from error
    figure = Figure(figsize=(8, 5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    return axes


def save_figure(axes, path: str, legend_size: str = 'medium') -> None:
    """Add a legend and write the figure to a PNG file. UserError if it cannot be written.

    Labels are printed as they are: they hold names of folders and files, where a $ starts no formula.
    """
    for text in axes.legend(fontsize=legend_size).get_texts():
        text.set_parse_math(False)
    axes.figure.tight_layout()
    with user_errors(OSError, ValueError, where=f'cannot write {path}: '):
        axes.figure.savefig(path)
    print(f'wrote {path}')
