//! Reads and changes the kernel: the only caller of netlink, nft and sysctl.

mod netlink;
mod nfnetlink;
pub mod nft;
