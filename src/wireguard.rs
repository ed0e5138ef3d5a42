//! A WireGuard device in userspace.

pub mod key;
pub mod uapi;
