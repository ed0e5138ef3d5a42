//! Curve25519 keys and preshared keys, in the forms people and programs write them.
//!
//! Private keys are wiped when dropped and never printed. The agent keeps them in a file.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use boringtun::x25519;
use ring::rand::SystemRandom;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// The reason why text is not a key. It has no part of the text, which may be private.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InvalidKey {
    /// Not standard base64, or not of 32 bytes.
    #[error("a key is 32 bytes in base64, 44 characters ending in =")]
    Encoding,
    /// A public key of small order, with which every shared secret is zero (RFC 7748, 6.1).
    #[error("the public key is zero or of small order")]
    LowOrder,
}

/// A Curve25519 public key.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PublicKey(pub [u8; 32]);

/// A Curve25519 private key.
#[derive(Clone, Eq, PartialEq, Zeroize, ZeroizeOnDrop)]
pub struct PrivateKey(pub [u8; 32]);

/// A symmetric key mixed into the handshake (WireGuard paper 5.2).
#[derive(Clone, Eq, PartialEq, Zeroize, ZeroizeOnDrop)]
pub struct PresharedKey(pub [u8; 32]);

fn decode(text: &str) -> Result<[u8; 32], InvalidKey> {
    let mut key = [0; 32];
    match STANDARD.decode_slice(text.as_bytes(), &mut key) {
        Ok(32) if text.len() == 44 => Ok(key),
        Ok(_) | Err(_) => Err(InvalidKey::Encoding),
    }
}

impl PublicKey {
    /// Whether a shared secret with this key can be secret at all: false for a key of small order.
    pub fn is_low_order(&self) -> bool {
        // A clamped scalar is a multiple of the cofactor: it sends exactly the small subgroup to zero.
        let secret = x25519::StaticSecret::from([1; 32]);
        !secret.diffie_hellman(&self.0.into()).was_contributory()
    }
}

impl FromStr for PublicKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let key = Self(decode(text)?);
        if key.is_low_order() {
            return Err(InvalidKey::LowOrder);
        }
        Ok(key)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl serde::Serialize for PublicKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for PublicKey {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl PrivateKey {
    /// A new key from the system's random numbers.
    pub fn generate() -> Self {
        Self(
            ring::rand::generate(&SystemRandom::new())
                .expect("the system gives random numbers")
                .expose(),
        )
    }

    /// The public key of this private key.
    pub fn public_key(&self) -> PublicKey {
        let secret = x25519::StaticSecret::from(self.0);
        PublicKey(x25519::PublicKey::from(&secret).to_bytes())
    }

    /// The key in base64, for its file only.
    pub fn to_base64(&self) -> zeroize::Zeroizing<String> {
        zeroize::Zeroizing::new(STANDARD.encode(self.0))
    }
}

impl FromStr for PrivateKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        decode(text).map(Self)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(private key)")
    }
}

impl PresharedKey {
    /// The key in base64, for a configuration that is meant to hold it.
    pub fn to_base64(&self) -> zeroize::Zeroizing<String> {
        zeroize::Zeroizing::new(STANDARD.encode(self.0))
    }
}

impl FromStr for PresharedKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        decode(text).map(Self)
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(preshared key)")
    }
}
