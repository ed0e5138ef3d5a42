//! A device and its configuration socket: large and unusual requests, keys, signals, cleanup.

use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use selvedge_lab::netns::Namespace;
use selvedge_lab::process::wait_for;

use crate::tunnel::{Key, Program, SOON, Tunnel};

/// A device alone in a namespace.
struct Device {
    tunnel: Tunnel,
    space: Namespace,
}

impl Device {
    fn new(program: Program) -> Result<Self> {
        let space = Namespace::new("alone")?;
        let tunnel = Tunnel::start(program, &space)?;
        Ok(Self { tunnel, space })
    }

    /// Gives the device a configuration file's text, as `wg setconf` does.
    fn configure(&self, text: &str) -> Result<()> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("conf");
        fs::write(&path, text)?;
        self.tunnel
            .wg(&format!("setconf {{}} {}", path.display()))
            .map(drop)
    }

    /// Sends the text to the socket, closes that direction and returns the answer.
    fn say(&self, text: &str) -> Result<String> {
        let mut stream = UnixStream::connect(self.tunnel.socket())?;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(text.as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    fn has_link(&self) -> Result<bool> {
        let links = self.space.run("ip -o link")?;
        Ok(links.contains(&self.tunnel.name))
    }
}

fn hex(key: &Key) -> Result<String> {
    use std::str::FromStr as _;
    let public = selvedge::wireguard::key::PublicKey::from_str(&key.public)?;
    Ok(public.0.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// 130,560 prefixes on one peer, more than any buffer of the protocol holds at once.
pub(crate) fn a_peer_may_have_100_kilobytes_of_allowed_ips(program: Program) -> Result<()> {
    let device = Device::new(program)?;
    let (own, peer) = (Key::new()?, Key::new()?);
    let mut text = format!(
        "[Interface]\nPrivateKey={}\n[Peer]\nPublicKey={}\n",
        own.private()?,
        peer.public
    );
    for a in 1..=255 {
        for b in 0..=255 {
            writeln!(text, "AllowedIPs={a}.{b}.0.0/16,{a:x}::{b:x}/128")?;
        }
    }
    device.configure(&text)?;
    let shown = device.tunnel.wg("show {} allowed-ips")?;
    let words = shown.split_whitespace().count();
    ensure!(words == 255 * 256 * 2 + 1, "{words} words came back");
    Ok(())
}

pub(crate) fn forty_peers_may_have_52_allowed_ips_each(program: Program) -> Result<()> {
    let device = Device::new(program)?;
    let mut text = format!("[Interface]\nPrivateKey={}\n", Key::new()?.private()?);
    for a in 1..=40 {
        writeln!(text, "[Peer]\nPublicKey={}", Key::new()?.public)?;
        for b in 1..=52 {
            writeln!(text, "AllowedIPs={a}.{b}.0.0/16")?;
        }
    }
    device.configure(&text)?;
    let shown = device.tunnel.wg("show {} allowed-ips")?;
    ensure!(
        shown.lines().count() == 40,
        "{} peers",
        shown.lines().count()
    );
    for line in shown.lines() {
        let words = line.split_whitespace().count();
        ensure!(words == 53, "{words} words: {line}");
    }
    Ok(())
}

/// The last peer that is given a prefix has it.
pub(crate) fn an_allowed_ip_has_one_owner(program: Program) -> Result<()> {
    let device = Device::new(program)?;
    let mut text = format!("[Interface]\nPrivateKey={}\n", Key::new()?.private()?);
    let mut last = String::new();
    for _ in 0..29 {
        last = Key::new()?.public;
        writeln!(
            text,
            "[Peer]\nPublicKey={last}\nAllowedIPs=255.2.3.4/32,abcd::255/128"
        )?;
    }
    device.configure(&text)?;
    device.tunnel.wg("showconf {}")?;
    let shown = device.tunnel.wg("show {} allowed-ips")?;
    for line in shown.lines() {
        let (key, ips) = line.split_once('\t').context("two columns")?;
        let expected = key == last;
        ensure!((ips != "(none)") == expected, "{key} of {last} has {ips}");
    }
    let empty = Key::new()?.public;
    device.tunnel.set(&format!("peer {empty}"))?;
    ensure!(device.tunnel.peer("allowed-ips", &empty)? == "(none)");
    Ok(())
}

pub(crate) fn allowed_ips_of_all_lengths_are_replaced(program: Program) -> Result<()> {
    let device = Device::new(program)?;
    let peer = Key::new()?.public;
    for ips in [
        "0.0.0.0/0 10.0.0.0/8 100.0.0.0/10 172.16.0.0/12 192.168.0.0/16",
        "0.0.0.0/0",
        "::/0 1700::/111 5000::/4 9000::/75 e000::/37",
        "::/0",
    ] {
        device.tunnel.set(&format!(
            "peer {peer} allowed-ips {}",
            ips.replace(' ', ",")
        ))?;
        let shown = device.tunnel.peer("allowed-ips", &peer)?;
        let mut shown: Vec<_> = shown.split_whitespace().collect();
        shown.sort_unstable();
        let mut expected: Vec<_> = ips.split_whitespace().collect();
        expected.sort_unstable();
        ensure!(shown == expected, "{ips} came back as {shown:?}");
    }
    // Host bits are ignored.
    device
        .tunnel
        .set(&format!("peer {peer} allowed-ips 10.1.2.3/8"))?;
    ensure!(device.tunnel.peer("allowed-ips", &peer)? == "10.0.0.0/8");
    Ok(())
}

pub(crate) fn keys_are_shown_and_cleared(program: Program) -> Result<()> {
    let device = Device::new(program)?;
    let tunnel = &device.tunnel;
    let (own, psk, peer) = (Key::new()?, Key::new()?, Key::new()?.public);
    tunnel.set(&format!(
        "private-key {} peer {peer} preshared-key {}",
        own.file(),
        psk.file()
    ))?;
    ensure!(tunnel.wg("show {} private-key")? == own.private()?);
    ensure!(tunnel.wg("show {} public-key")? == own.public);
    ensure!(tunnel.peer("preshared-keys", &peer)? == psk.private()?);
    tunnel.set(&format!(
        "private-key /dev/null peer {peer} preshared-key /dev/null"
    ))?;
    ensure!(tunnel.wg("show {} private-key")? == "(none)");
    ensure!(tunnel.peer("preshared-keys", &peer)? == "(none)");
    ensure!(tunnel.wg("show {} peers")? == peer);
    Ok(())
}

/// A private key is shown clamped, as it is used.
pub(crate) fn a_private_key_is_clamped(program: Program) -> Result<()> {
    let device = Device::new(program)?;
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("key");
    let rest = &Key::new()?.private()?[1..];
    fs::write(&path, format!("/{rest}"))?;
    device
        .tunnel
        .set(&format!("private-key {}", path.display()))?;
    let shown = device.tunnel.wg("show {} private-key")?;
    ensure!(shown == format!("+{rest}"), "it was taken unclamped");
    Ok(())
}

/// A request that breaks off within a line, or before the empty line, has no effect.
pub(crate) fn a_request_that_breaks_off_changes_nothing(program: Program) -> Result<()> {
    let device = Device::new(program)?;
    let peer = Key::new()?;
    let key = hex(&peer)?;
    device.say(&format!(
        "set=1\npublic_key={key}\nallowed_ip=10.0.0.0/24\n\n"
    ))?;
    for cut in [
        format!("set=1\npublic_key={key}\nreplace_allowed_ips=true\nallowed_ip=10.0.0.0/2"),
        format!("set=1\npublic_key={key}\nallowed_ip=10.0.0.0/2\n"),
        format!("set=1\npublic_key={key}\nremove=true\n"),
        format!("set=1\npublic_key={key}\nremove=tru"),
    ] {
        device.say(&cut)?;
        let shown = device.tunnel.peer("allowed-ips", &peer.public)?;
        ensure!(shown == "10.0.0.0/24", "half a request left {shown}: {cut}");
    }
    Ok(())
}

pub(crate) fn invalid_requests_are_refused(program: Program) -> Result<()> {
    let device = Device::new(program)?;
    let key = hex(&Key::new()?)?;
    let long = format!("set=1\nfwmark={}\n\n", "1".repeat(1 << 20));
    for request in [
        "set=1\nunknown=1\n\n",
        "set=1\nlisten_port=65536\n\n",
        "set=1\nfwmark=-1\n\n",
        "set=1\nreplace_peers=false\n\n",
        "set=1\nendpoint=127.0.0.1:1\n\n",
        "set=1\nprivate_key=00\n\n",
        "set=1\nfwmark=1\0\n\n",
        &long,
        &format!("set=1\npublic_key={key}\nallowed_ip=10.0.0.0/33\n\n"),
        &format!("set=1\npublic_key={key}\nprotocol_version=2\n\n"),
        &format!("set=1\npublic_key={key}\npersistent_keepalive_interval=25s\n\n"),
        &format!("set=1\npublic_key={key}\nendpoint=localhost:1\n\n"),
    ] {
        let answer = device.say(request)?;
        let shown = &request[..request.len().min(200)];
        ensure!(
            answer.starts_with("errno=-") || answer.is_empty(),
            "{shown:?} is answered {answer:?}"
        );
    }
    let answer = device.say("get=1\n\n")?;
    ensure!(answer.ends_with("errno=0\n\n"), "{answer}");
    Ok(())
}

/// `update_only`, `remove` and `replace_peers`, which `wg` does not offer or hides.
pub(crate) fn peers_are_updated_removed_and_replaced(program: Program) -> Result<()> {
    let device = Device::new(program)?;
    let keys = [Key::new()?, Key::new()?, Key::new()?];
    let [a, b, c] = [hex(&keys[0])?, hex(&keys[1])?, hex(&keys[2])?];
    let peers = || -> Result<Vec<usize>> {
        let shown = device.tunnel.wg("show {} peers")?;
        Ok((0..3)
            .filter(|&i| shown.contains(&keys[i].public))
            .collect())
    };
    let say = |lines: &str| -> Result<()> {
        let answer = device.say(&format!("set=1\n{lines}\n"))?;
        ensure!(answer == "errno=0\n\n", "{lines:?} is answered {answer:?}");
        Ok(())
    };
    say(&format!("public_key={a}\npublic_key={b}\n"))?;
    ensure!(peers()? == [0, 1]);
    say(&format!(
        "public_key={c}\nupdate_only=true\nallowed_ip=10.0.0.0/8\n"
    ))?;
    ensure!(
        peers()? == [0, 1],
        "a peer that is only to be updated is not made"
    );
    say(&format!(
        "public_key={b}\nremove=true\npublic_key={c}\nremove=true\n"
    ))?;
    ensure!(peers()? == [0]);
    say(&format!(
        "replace_peers=true\npublic_key={b}\npublic_key={c}\n"
    ))?;
    ensure!(peers()? == [1, 2]);
    say("replace_peers=true\n")?;
    ensure!(peers()?.is_empty());
    Ok(())
}

/// A minus removes one prefix, and only from the peer that has it.
pub(crate) fn a_single_allowed_ip_is_removed(program: Program) -> Result<()> {
    let device = Device::new(program)?;
    let (one, two) = (Key::new()?, Key::new()?);
    let keys = [hex(&one)?, hex(&two)?];
    device.say(&format!(
        "set=1\npublic_key={}\nallowed_ip=10.0.0.0/8\nallowed_ip=10.1.0.0/16\nallowed_ip=fd00::/8\n\n",
        keys[0]
    ))?;
    device.say(&format!(
        "set=1\npublic_key={}\nallowed_ip=-10.0.0.0/8\npublic_key={}\nallowed_ip=-fd00::/8\n\n",
        keys[0], keys[1]
    ))?;
    let shown = device.tunnel.peer("allowed-ips", &one.public)?;
    let mut shown: Vec<_> = shown.split_whitespace().collect();
    shown.sort_unstable();
    ensure!(shown == ["10.1.0.0/16", "fd00::/8"], "{shown:?} remain");
    Ok(())
}

pub(crate) fn a_hundred_idle_clients_block_others_for_a_while_only(program: Program) -> Result<()> {
    let device = Device::new(program)?;
    let clients: Vec<_> = (0..100)
        .map(|_| UnixStream::connect(device.tunnel.socket()))
        .collect::<Result<_, _>>()?;
    drop(clients);
    wait_for("wg to be served", SOON, || {
        device.tunnel.wg("show {}").is_ok()
    })?;
    Ok(())
}

pub(crate) fn sigterm_removes_link_and_socket(program: Program) -> Result<()> {
    for up in [false, true] {
        let mut device = Device::new(program)?;
        if up {
            device
                .space
                .run(&format!("ip link set {} up", device.tunnel.name))?;
        }
        ensure!(device.has_link()?, "there is no link to begin with");
        device.tunnel.signal(Signal::SIGTERM);
        wait_for("the end", SOON, || device.tunnel.ended())?;
        ensure!(!device.has_link()?, "the link is still there");
        ensure!(!device.tunnel.socket().exists(), "so is the socket");
    }
    Ok(())
}

/// A link may be deleted by hand or with its namespace; `wg-quick down` depends on it.
pub(crate) fn a_deleted_link_ends_the_daemon(program: Program) -> Result<()> {
    let mut device = Device::new(program)?;
    let name = device.tunnel.name.clone();
    device.space.run(&format!("ip link set {name} up"))?;
    device.space.run(&format!("ip link delete {name}"))?;
    wait_for("the end", SOON, || device.tunnel.ended())?;
    ensure!(
        !device.tunnel.socket().exists(),
        "the socket is still there"
    );
    Ok(())
}

pub(crate) fn many_devices_leave_nothing_behind(program: Program) -> Result<()> {
    let space = Namespace::new("many")?;
    let key = Key::new()?;
    for _ in 0..10 {
        let mut tunnel = Tunnel::start(program, &space)?;
        tunnel.set(&format!("private-key {}", key.file()))?;
        space.run(&format!("ip link set {} up", tunnel.name))?;
        let socket = tunnel.socket();
        tunnel.stop()?;
        ensure!(!socket.exists(), "a socket is left");
    }
    let links = space.run("ip -o link")?;
    ensure!(links.lines().count() == 1, "links are left: {links}");
    let sockets = space.run("ss -Huan")?;
    ensure!(sockets.trim().is_empty(), "sockets are left: {sockets}");
    Ok(())
}

devices! {
    a_peer_may_have_100_kilobytes_of_allowed_ips;
    forty_peers_may_have_52_allowed_ips_each;
    an_allowed_ip_has_one_owner;
    allowed_ips_of_all_lengths_are_replaced;
    keys_are_shown_and_cleared;
    a_private_key_is_clamped;
    a_request_that_breaks_off_changes_nothing fails with WireguardGo: "half a request left 0.0.0.0/2";
    invalid_requests_are_refused;
    peers_are_updated_removed_and_replaced;
    a_single_allowed_ip_is_removed;
    a_hundred_idle_clients_block_others_for_a_while_only;
    sigterm_removes_link_and_socket;
    a_deleted_link_ends_the_daemon;
    many_devices_leave_nothing_behind;
}
