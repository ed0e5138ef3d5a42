//! A WireGuard device in userspace.

pub mod key;
