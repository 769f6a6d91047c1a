"""The types that all packages share: topology, placement, errors, findings, causes. All but digests load no torch."""
