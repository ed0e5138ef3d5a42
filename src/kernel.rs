//! Reads and changes the kernel: the only caller of netlink, nft and sysctl.
