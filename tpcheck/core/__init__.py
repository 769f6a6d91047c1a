"""What everything else speaks in: topology, placement, errors, findings, causes. The integer parts load no torch."""
