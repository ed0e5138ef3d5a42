//! A DNS server that knows a few names, until the test changes them (RFC 1035, one question each).

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use selvedge_lab::Namespace;

const HEADER: usize = 12;
const TYPE_A: [u8; 2] = [0, 1];

/// One that runs; it ends with the value.
pub(super) struct Dns {
    names: Arc<Mutex<BTreeMap<String, Name>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Name {
    address: Option<Ipv4Addr>,
    /// How many questions were left without an answer.
    unanswered: usize,
}

impl Dns {
    /// Serves in a namespace at one of its addresses.
    pub(super) fn start(namespace: &Namespace, address: Ipv4Addr) -> io::Result<Self> {
        let socket = namespace.within(|| UdpSocket::bind((address, 53)))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let names = Arc::new(Mutex::new(BTreeMap::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (known, stopped) = (Arc::clone(&names), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                    continue;
                };
                if let Some(answer) = answer(&buffer[..length], &mut lock(&known)) {
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Ok(Self {
            names,
            stop,
            thread: Some(thread),
        })
    }

    /// From now on gives this address for a name, or says nothing at all.
    pub(super) fn answer(&self, name: &str, address: Option<Ipv4Addr>) {
        let mut names = lock(&self.names);
        names.entry(name.to_owned()).or_default().address = address;
    }

    /// How many questions for a name were left without an answer.
    pub(super) fn unanswered(&self, name: &str) -> usize {
        lock(&self.names)
            .get(name)
            .map_or(0, |name| name.unanswered)
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(names: &Mutex<BTreeMap<String, Name>>) -> MutexGuard<'_, BTreeMap<String, Name>> {
    names.lock().unwrap()
}

/// The answer to a question: an address, no data of that type, or no such name. None for a name that
/// nothing is said of.
fn answer(query: &[u8], names: &mut BTreeMap<String, Name>) -> Option<Vec<u8>> {
    let mut labels = Vec::new();
    let mut rest = query.get(HEADER..)?;
    loop {
        let (length, after) = rest.split_first()?;
        let (label, after) = after.split_at_checked(usize::from(*length))?;
        rest = after;
        if label.is_empty() {
            break;
        }
        labels.push(String::from_utf8_lossy(label).to_lowercase());
    }
    // The type, and the class behind it.
    let kind = rest.get(..4)?.get(..2)?;
    let question = &query[HEADER..query.len() - rest.len() + 4];
    let name = names.get_mut(&labels.join("."));
    let (code, address) = match name {
        Some(Name {
            address: Some(address),
            ..
        }) => (0, Some(*address).filter(|_| kind == TYPE_A)),
        Some(name) => {
            name.unanswered += 1;
            return None;
        }
        // NXDOMAIN.
        None => (3, None),
    };
    let answers = u8::from(address.is_some());
    let mut answer = query[..2].to_vec();
    // A response, recursion desired and available; one question, so many answers, nothing else.
    answer.extend([0x81, 0x80 | code, 0, 1, 0, answers, 0, 0, 0, 0]);
    answer.extend(question);
    if let Some(address) = address {
        // The name stands in the question; class IN, for a second, four bytes.
        answer.extend([0xc0, HEADER as u8]);
        answer.extend(TYPE_A);
        answer.extend([0, 1, 0, 0, 0, 1, 0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}
