//! `selvedge connect`: an external peer on this machine, kept in step with the cluster.
