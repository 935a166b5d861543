"""`tandem up --on ray`: the same processes as on one machine, each under an actor of a Ray cluster.

Only this folder speaks to Ray, and its modules import it only when they are called: everything else of Tandem works
where it is not installed.
"""
