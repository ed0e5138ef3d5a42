//! `selvedge showconf`: WireGuard configuration of a node or peer, as Kilo prints it.
