"""The report: all numbers of a run in, one self-contained HTML file out.

Pure functions: the same ``ReportData`` gives the same text, byte for byte. Its records are in ``report_data``, its words in
``report_text``, its figures in ``report_figures``; the page is laid out in ``report.html.j2``.
"""

from jinja2 import Environment

from tasks.pages.best_of_n_table import best_of_n_sentence, best_of_n_tables
from tasks.pages.report_data import ReportData
from tasks.pages.report_figures import benchmark_columns, first_of_each, heat_map, page_figures, scaled, variant_label
from tasks.pages.report_text import answer, by_overvaluation, elo, number, p_value, span
from tasks.pages.sheets import standalone, themed
from tasks.pages.templates import template_environment


def render_report(data: ReportData) -> str:
    """Render the report: one HTML page without any request to the outside.

    Args:
        data: All numbers.

    Returns:
        The page. The same data and versions give the same text, so it can be stored by its content.
    """
    template = page_environment().get_template("report.html.j2")
    return template.render(data=data, answer=answer(data), figures=page_figures(data))


def page_environment() -> Environment:
    """Jinja with what the pages' templates use."""
    environment = template_environment()
    environment.filters.update(
        number=number, elo=elo, span=span, p_value=p_value, scaled=scaled, themed=themed, heat_map=heat_map
    )
    environment.globals.update(
        by_overvaluation=by_overvaluation,
        first_of_each=first_of_each,
        benchmark_columns=benchmark_columns,
        variant_label=variant_label,
        best_of_n_tables=best_of_n_tables,
        best_of_n_sentence=best_of_n_sentence,
    )
    return environment


def figures_for_tracking(data: ReportData) -> dict[str, bytes]:
    """The figures as SVG files of their own, for a tracker's artifacts: file name to content."""
    return {f"{name}.svg": standalone(figure.wide or figure.narrow) for name, figure in page_figures(data).items()}
