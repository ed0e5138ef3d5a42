//! Runs a program as the container of Selvedge's DaemonSet would be run, without a container
//! runtime: `selvedge-lab-confine ROOT MANIFEST PROGRAM ARGS...`. Where ARGS begin with `guard`, it is the
//! init container.
//!
//! ROOT is the image's file system; MANIFEST says which capabilities the container has, which of the
//! host's paths it sees, and that it writes nowhere else. The network is the one this is started in,
//! as with `hostNetwork`. Left out are seccomp, cgroups and the namespace of processes.
#![expect(unsafe_code, reason = "nix cannot drop capabilities")]

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde::Deserialize as _;
use serde_json::Value;

/// What a container runtime gives every container.
const DEVICES: [&str; 3] = ["/dev/null", "/dev/zero", "/dev/urandom"];
/// What the kubelet gives every pod, where it is there.
const OF_THE_POD: [&str; 2] = [
    "/var/run/secrets/kubernetes.io/serviceaccount",
    "/etc/resolv.conf",
];
/// `CAP_LAST_CAP` of any kernel is below.
const CAPABILITIES: u32 = 64;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [root, manifest, program, rest @ ..] = arguments.as_slice() else {
        bail!("usage: selvedge-lab-confine ROOT MANIFEST PROGRAM ARGS...");
    };
    let list = match rest.first().map(String::as_str) {
        Some("guard") => "initContainers",
        _ => "containers",
    };
    let container = Container::read(Path::new(manifest), list)?;
    let root = Path::new(root);

    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace needs root")?;
    remount("/", MsFlags::MS_PRIVATE | MsFlags::MS_REC)?;
    bind(root, root)?;
    for (path, read_only) in container.paths.iter().chain(&kubeconfig(rest)) {
        show(path, root, *read_only)?;
    }
    for path in DEVICES {
        show(Path::new(path), root, false)?;
    }
    for path in OF_THE_POD.map(Path::new) {
        if path.exists() {
            show(path, root, true)?;
        }
    }
    show(Path::new("/proc"), root, false)?;
    show(Path::new("/proc/sys"), root, true)?;
    show(Path::new("/sys"), root, true)?;
    if container.read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        remount(root, flags)?;
    }
    nix::unistd::chroot(root).context("entering the image")?;
    nix::unistd::chdir("/")?;

    for capability in 0..CAPABILITIES {
        if !container.capabilities.contains(&capability) {
            // SAFETY: takes numbers only. It fails for those that the kernel does not have.
            unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        }
    }
    let left = bounding()?;
    let wanted = container
        .capabilities
        .iter()
        .fold(0, |set, capability| set | 1_u64 << capability);
    ensure!(
        left == wanted,
        "the capabilities {left:#x} are left, not {wanted:#x}"
    );
    if !container.escalates {
        nix::sys::prctl::set_no_new_privs()?;
    }
    // Returns only if it fails.
    let error = Command::new(program).args(rest).exec();
    Err(error).with_context(|| format!("running {program} in {}", root.display()))
}

/// The capabilities that no program started from here can exceed.
fn bounding() -> anyhow::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
    Ok(u64::from_str_radix(line.context("no CapBnd")?.trim(), 16)?)
}

/// What the manifest says of the container.
struct Container {
    /// Numbers of `linux/capability.h`.
    capabilities: Vec<u32>,
    /// Paths of the host, which are the same inside, and whether they are read-only.
    paths: Vec<(PathBuf, bool)>,
    read_only: bool,
    escalates: bool,
}

impl Container {
    /// The first container of the pod's `list`.
    fn read(manifest: &Path, list: &str) -> anyhow::Result<Self> {
        let text = fs::read_to_string(manifest).with_context(|| manifest.display().to_string())?;
        let pod = serde_yaml_ng::Deserializer::from_str(&text)
            .filter_map(|document| Value::deserialize(document).ok())
            .find(|object| object["kind"] == "DaemonSet")
            .map(|object| object["spec"]["template"]["spec"].clone())
            .with_context(|| format!("{} has no DaemonSet", manifest.display()))?;
        let container = &pod[list][0];
        let security = &container["securityContext"];
        ensure!(
            security["capabilities"]["drop"] == serde_json::json!(["ALL"]),
            "the container keeps capabilities that it does not name"
        );
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let mut paths = Vec::new();
        for mounted in list(&container["volumeMounts"]) {
            let volumes = list(&pod["volumes"]);
            let volume = volumes
                .iter()
                .find(|volume| volume["name"] == mounted["name"]);
            let path = volume.and_then(|volume| volume["hostPath"]["path"].as_str());
            let path =
                path.with_context(|| format!("{} is no path of the host", mounted["name"]))?;
            ensure!(mounted["mountPath"] == path, "{path} is elsewhere inside");
            let read_only = mounted["readOnly"].as_bool().unwrap_or(false);
            paths.push((PathBuf::from(path), read_only));
        }
        Ok(Self {
            capabilities: list(&security["capabilities"]["add"])
                .iter()
                .map(number)
                .collect::<anyhow::Result<_>>()?,
            paths,
            read_only: security["readOnlyRootFilesystem"] == true,
            escalates: security["allowPrivilegeEscalation"] != false,
        })
    }
}

fn number(capability: &Value) -> anyhow::Result<u32> {
    Ok(match capability.as_str() {
        Some("NET_ADMIN") => 12,
        Some("NET_RAW") => 13,
        Some("SYS_NICE") => 23,
        _ => bail!("the capability {capability} is not known here"),
    })
}

/// The file of `--kubeconfig` and those it names, which a pod would get in a volume.
fn kubeconfig(arguments: &[String]) -> Vec<(PathBuf, bool)> {
    let mut words = arguments.iter();
    let mut files = Vec::new();
    while let Some(word) = words.next() {
        let file = match word.strip_prefix("--kubeconfig=") {
            Some(file) => Some(file),
            None if word == "--kubeconfig" => words.next().map(String::as_str),
            None => None,
        };
        let Some(file) = file else { continue };
        files.push((PathBuf::from(file), true));
        let text = fs::read_to_string(file).unwrap_or_default();
        let content = serde_yaml_ng::from_str::<Value>(&text).unwrap_or_default();
        for (list, entry, keys) in [
            ("clusters", "cluster", &["certificate-authority"][..]),
            ("users", "user", &["client-certificate", "client-key"]),
        ] {
            for item in content[list].as_array().into_iter().flatten() {
                let named = keys.iter().filter_map(|key| item[entry][key].as_str());
                files.extend(named.map(|path| (PathBuf::from(path), true)));
            }
        }
    }
    files
}

/// Lets a path be seen below `root`, too. A directory of the host that is missing is made, as
/// `DirectoryOrCreate` has it.
fn show(path: &Path, root: &Path, read_only: bool) -> anyhow::Result<()> {
    let inside = root.join(path.strip_prefix("/").unwrap_or(path));
    if !path.exists() {
        fs::create_dir_all(path).with_context(|| path.display().to_string())?;
    }
    if path.is_dir() {
        fs::create_dir_all(&inside)?;
    } else {
        fs::create_dir_all(inside.parent().unwrap_or(root))?;
        fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&inside)?;
    }
    bind(path, &inside)?;
    if read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        remount(&inside, flags)?;
    }
    Ok(())
}

fn bind(from: &Path, to: &Path) -> anyhow::Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(from), to, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("mounting {} on {}", from.display(), to.display()))
}

fn remount(path: impl AsRef<Path>, flags: MsFlags) -> anyhow::Result<()> {
    let path = path.as_ref();
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("remounting {}", path.display()))
}
