"""`tpcheck.watch`: is every batch the same inside each TP group, other on each replica, and if not, why?"""
