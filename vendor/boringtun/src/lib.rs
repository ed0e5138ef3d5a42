// Copyright (c) 2019 Cloudflare, Inc. All rights reserved.
// SPDX-License-Identifier: BSD-3-Clause

//! The handshake and cookies of the WireGuard protocol, from boringtun.
//!
//! `PATCHES.md` lists what was left out and what was changed, and why. No file of `src` is edited by
//! hand: `scripts/vendor-boringtun` makes them from the release and the patches.

pub mod noise;

/// Re-export of the x25519 types
pub mod x25519 {
    pub use x25519_dalek::{PublicKey, ReusableSecret, SharedSecret, StaticSecret};
}
