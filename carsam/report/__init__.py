"""The report: a packed folder and its diagnosis as one HTML file that needs nothing else.

:mod:`carsam.report.source` reads the folder, :mod:`carsam.report.sections` says what there is to see in it,
:mod:`carsam.report.charts` draws, and :mod:`carsam.report.page` puts it together.
"""
