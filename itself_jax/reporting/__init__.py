"""What a run's report shows, and how: `report.py` is the command, a run writes one at its end.

`history` reads what a run wrote; `examples` asks its model; `charts` draws; `page` writes the page.
"""
