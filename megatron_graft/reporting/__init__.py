"""What a finished run did, from the files it left: ``report.json``, ``report.md`` and ``loss.png``."""
