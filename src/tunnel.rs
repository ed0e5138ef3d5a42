//! `selvedge tunnel`: a plain WireGuard device, driven by `wg`.
