//! Ranks that reach each other by TCP, one connection between any two.
//!
//! Rank 0 listens at an address that all know. Every other rank opens a port of its own, connects to
//! rank 0 and tells it that port; rank 0 gives the list of all to all; each connects to those before
//! it. From then on a thread for each connection waits for frames:
//!
//! ```text
//! kind        1 byte     0 message, 1 the run is ended and why, 2 done
//! length      8 bytes
//! bytes
//! ```
//! A connection that ends without *done* is a lost rank: whoever waits hears of it at once, also
//! while this rank computes, and a machine that is gone without a word within [`KEEPALIVE`].
//!
//! Nothing is encrypted and nobody is asked who he is: for machines that trust their network, as with
//! MPI. Frames that are none, lengths that are not kept and strangers at the door are errors, not
//! more.

use super::{Communicator, Meter, Traffic, message};
use crate::{Error, Result};
use message::{Message, Received};
use serde::{Deserialize, Serialize};
use socket2::{SockRef, TcpKeepalive};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

const MAGIC: &[u8; 8] = b"vlmqrank";
const VERSION: u32 = 1;
const HELLO: usize = MAGIC.len() + 4 * size_of::<u32>();

/// After so long without an answer a silent machine is asked whether it is there, thrice.
const KEEPALIVE: Duration = Duration::from_secs(3);

/// How long whoever connects has to say who he is.
const HELLO_TIME: Duration = Duration::from_secs(10);

/// How long an error of a connection waits for the word that explains it.
const EXPLANATION_TIME: Duration = Duration::from_millis(500);

/// Between two tries to reach somebody who is not there yet.
const RETRY: Duration = Duration::from_millis(50);

/// Bytes that are made room for before they are there.
const MAX_RESERVED: u64 = 64 << 20;

const DATA: u8 = 0;
const ABORT: u8 = 1;
const DONE: u8 = 2;

/// Where ranks meet.
#[derive(Clone, Debug)]
pub struct Rendezvous {
    /// This one's place, from 0.
    pub rank: usize,
    /// How many there are.
    pub n_ranks: usize,
    /// Name or address of rank 0's machine.
    pub host: String,
    /// Where rank 0 listens there.
    pub port: u16,
    /// How long to wait for the others.
    pub patience: Duration,
}

/// A rank that reaches the others by TCP.
pub struct Tcp {
    rank: usize,
    /// By rank, `None` at one's own place.
    peers: Vec<Option<Peer>>,
    end: Arc<End>,
    meter: Meter,
}

struct Peer {
    stream: Arc<Mutex<TcpStream>>,
    messages: Mutex<Receiver<Vec<u8>>>,
}

/// A rank that ended the run, by saying so or by being lost.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Why {
    rank: usize,
    is_lost: bool,
    text: String,
}

impl Why {
    /// Of an error that another rank is the cause of, or this one.
    fn of(error: &Error, own_rank: usize) -> Self {
        let (rank, is_lost, text) = match error {
            Error::RankLost { rank, why } => (*rank, true, why.clone()),
            Error::Rank { rank, why } => (*rank, false, why.clone()),
            own => (own_rank, false, own.to_string()),
        };
        Self {
            rank,
            is_lost,
            text,
        }
    }

    fn lost(rank: usize, text: &str) -> Self {
        Self {
            rank,
            is_lost: true,
            text: text.to_owned(),
        }
    }

    fn error(&self) -> Error {
        let (rank, why) = (self.rank, self.text.clone());
        match self.is_lost {
            true => Error::RankLost { rank, why },
            false => Error::Rank { rank, why },
        }
    }
}

/// How the run ended, where it has.
struct End {
    why: OnceLock<Why>,
    /// Whether this rank is through, and others may leave.
    is_done: AtomicBool,
    /// By rank, for those who are to hear of a loss from here.
    streams: OnceLock<Vec<Option<Arc<Mutex<TcpStream>>>>>,
    on_loss: Box<dyn Fn(&Error) + Send + Sync>,
}

impl End {
    fn set(&self, why: Why) {
        if self.is_done.load(Ordering::SeqCst) || self.why.set(why).is_err() {
            return;
        }
        self.pass_on();
        if let Some(error) = self.error() {
            (self.on_loss)(&error);
        }
    }

    /// Tells the others whom it began with: else they might notice this rank's end first. Who is
    /// being sent something at this moment is left to find out.
    fn pass_on(&self) {
        let Some(why) = self.why.get() else {
            return;
        };
        let frame = frame(ABORT, &Message::new(why).into_bytes());
        let streams = self.streams.get().into_iter().flatten().enumerate();
        for (_, stream) in streams.filter(|(rank, _)| *rank != why.rank) {
            if let Some(Ok(mut stream)) = stream.as_ref().map(|stream| stream.try_lock()) {
                // Whoever is gone himself needs no word.
                let _ = stream.write_all(&frame);
            }
        }
    }

    fn error(&self) -> Option<Error> {
        self.why.get().map(Why::error)
    }
}

impl Tcp {
    /// Waits until all ranks are there. `on_loss` is called from another thread as soon as a rank is
    /// lost or ends the run, once, whatever this rank does at that time.
    ///
    /// # Errors
    /// [`Error::Rank`] if the others are not there in time, or have another idea of how many they
    /// are; [`Error::Network`].
    pub fn connect(
        at: &Rendezvous,
        on_loss: impl Fn(&Error) + Send + Sync + 'static,
    ) -> Result<Self> {
        let deadline = Instant::now() + at.patience;
        let streams = match at.rank {
            0 => gather(at, deadline)?,
            _ => join(at, deadline)?,
        };
        let end = Arc::new(End {
            why: OnceLock::new(),
            is_done: AtomicBool::new(false),
            streams: OnceLock::new(),
            on_loss: Box::new(on_loss),
        });
        let peers = streams.into_iter().enumerate();
        let peers =
            peers.map(|(rank, stream)| stream.map(|s| Peer::new(rank, s, &end)).transpose());
        let peers: Vec<Option<Peer>> = peers.collect::<Result<_>>()?;
        let streams = peers
            .iter()
            .map(|p| p.as_ref().map(|p| Arc::clone(&p.stream)));
        let _ = end.streams.set(streams.collect());
        Ok(Self {
            rank: at.rank,
            peers,
            end,
            meter: Meter::default(),
        })
    }

    /// What a connection's failure comes from, which may be told by somebody else in a moment.
    fn lost(&self, rank: usize, why: &str) -> Error {
        let deadline = Instant::now() + EXPLANATION_TIME;
        loop {
            match self.end.error() {
                Some(error) => return error,
                None if Instant::now() > deadline => {
                    return Error::RankLost {
                        rank,
                        why: why.to_owned(),
                    };
                }
                None => thread::sleep(RETRY),
            }
        }
    }

    fn receive(&self, rank: usize, peer: &Peer) -> Result<Vec<u8>> {
        let messages = peer.messages.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            match messages.recv_timeout(EXPLANATION_TIME) {
                Ok(message) => return Ok(message),
                Err(RecvTimeoutError::Timeout) => {
                    // Somebody else may be lost whom this rank does not wait for.
                    if let Some(error) = self.end.error() {
                        return Err(error);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.lost(rank, "its connection has ended"));
                }
            }
        }
    }
}

impl Tcp {
    fn exchange(&self, outgoing: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        thread::scope(|scope| {
            let peers = self.peers.iter().zip(outgoing).enumerate();
            let sending: Vec<_> = peers
                .filter_map(|(rank, (peer, bytes))| Some((rank, peer.as_ref()?, *bytes)))
                .map(|(rank, peer, bytes)| scope.spawn(move || (rank, peer.send(DATA, bytes))))
                .collect();
            let peers = self.peers.iter().enumerate();
            let received = peers.map(|(rank, peer)| match peer {
                Some(peer) => self.receive(rank, peer),
                None => Ok(Vec::new()),
            });
            let received: Vec<Vec<u8>> = received.collect::<Result<_>>()?;
            for thread in sending {
                let (rank, sent) = thread.join().expect("sending does not panic");
                sent.map_err(|e| self.lost(rank, &e.to_string()))?;
            }
            Ok(received)
        })
    }
}

impl Communicator for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn n_ranks(&self) -> usize {
        self.peers.len()
    }

    fn all_to_all(&self, outgoing: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        self.meter
            .measure(self.rank, outgoing, || self.exchange(outgoing))
    }

    fn abort(&self, error: &Error) {
        self.end.is_done.store(true, Ordering::SeqCst);
        let why = Message::new(&Why::of(error, self.rank)).into_bytes();
        for peer in self.peers.iter().flatten() {
            // Whoever cannot be reached notices that this rank is gone.
            let _ = peer.send(ABORT, &why);
        }
    }

    fn traffic(&self) -> Traffic {
        self.meter.total()
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        let is_over = self.end.is_done.swap(true, Ordering::SeqCst) || self.end.why.get().is_some();
        for peer in self.peers.iter().flatten() {
            if !is_over && !thread::panicking() {
                let _ = peer.send(DONE, &[]);
            }
            let stream = peer.stream.lock().unwrap_or_else(|e| e.into_inner());
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
    }
}

impl Peer {
    fn new(rank: usize, stream: TcpStream, end: &Arc<End>) -> Result<Self> {
        prepare(&stream).map_err(|e| network("set up the connection", rank, e))?;
        let reading = stream.try_clone();
        let reading = reading.map_err(|e| network("share the connection", rank, e))?;
        let (sender, messages) = channel();
        let end = Arc::clone(end);
        thread::spawn(move || listen(rank, reading, &sender, &end));
        Ok(Self {
            stream: Arc::new(Mutex::new(stream)),
            messages: Mutex::new(messages),
        })
    }

    fn send(&self, kind: u8, bytes: &[u8]) -> io::Result<()> {
        let mut stream = self.stream.lock().unwrap_or_else(|e| e.into_inner());
        stream.write_all(&head_of(kind, bytes.len()))?;
        stream.write_all(bytes)
    }
}

fn head_of(kind: u8, length: usize) -> [u8; 9] {
    let mut head = [kind, 0, 0, 0, 0, 0, 0, 0, 0];
    head[1..].copy_from_slice(&(length as u64).to_le_bytes());
    head
}

fn frame(kind: u8, bytes: &[u8]) -> Vec<u8> {
    [&head_of(kind, bytes.len())[..], bytes].concat()
}

/// Takes what a rank sends until it is done or lost.
fn listen(rank: usize, mut stream: TcpStream, messages: &Sender<Vec<u8>>, end: &End) {
    loop {
        match read_frame(&mut stream) {
            Ok((DATA, bytes)) => {
                if messages.send(bytes).is_err() {
                    return;
                }
            }
            Ok((ABORT, why)) => {
                let why = Received::only(rank, &why);
                return end.set(why.unwrap_or_else(|error| Why::of(&error, rank)));
            }
            Ok((DONE, _)) => return,
            Ok((kind, _)) => {
                return end.set(Why::lost(rank, &format!("a frame of unknown kind {kind}")));
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return end.set(Why::lost(rank, "its connection has ended"));
            }
            Err(e) => {
                let text = format!("its connection has ended: {e}");
                return end.set(Why::lost(rank, &text));
            }
        }
    }
}

fn read_frame(stream: &mut TcpStream) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head)?;
    let [kind, length @ ..] = head;
    let length = u64::from_le_bytes(length);
    // What is announced need not come: memory is taken as it does.
    let mut bytes = Vec::with_capacity(length.min(MAX_RESERVED) as usize);
    stream.take(length).read_to_end(&mut bytes)?;
    match bytes.len() as u64 == length {
        true => Ok((kind, bytes)),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(None)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE);
    let keepalive = keepalive.with_interval(KEEPALIVE).with_retries(3);
    let socket = SockRef::from(stream);
    // What is sent and never confirmed is noticed by this and not by keeping alive.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_tcp_user_timeout(Some(4 * KEEPALIVE))?;
    socket.set_tcp_keepalive(&keepalive)
}

/// Rank 0: waits for all others and tells each where the others are.
fn gather(at: &Rendezvous, deadline: Instant) -> Result<Vec<Option<TcpStream>>> {
    let listener = listener(&at.host, at.port)?;
    let (streams, addresses) = accept(&listener, at, 1, deadline)?;
    for (rank, stream) in streams.iter().enumerate() {
        let Some(mut stream) = stream.as_ref() else {
            continue;
        };
        let message = Message::new(&addresses).into_bytes();
        let sent = stream.write_all(&frame(DATA, &message));
        sent.map_err(|e| network("tell where the others are to", rank, e))?;
    }
    Ok(streams)
}

/// Another rank: goes to rank 0 and from there to all others.
fn join(at: &Rendezvous, deadline: Instant) -> Result<Vec<Option<TcpStream>>> {
    let mut first = reach(&|| resolve(&at.host, at.port), 0, deadline)?;
    let own = first.local_addr();
    let own = own.map_err(|e| network("find the own address of the connection to", 0, e))?;
    let listener = TcpListener::bind((own.ip(), 0));
    let listener = listener.map_err(|e| network("open a port for ranks after", at.rank, e))?;
    let port = listener.local_addr().map(|a| a.port());
    let port = port.map_err(|e| network("find the own port of", at.rank, e))?;
    let hello = |stream: &mut TcpStream, rank: usize| {
        let sent = stream.write_all(&hello_of(at, port));
        sent.map_err(|e| network("greet", rank, e))
    };
    hello(&mut first, 0)?;
    let waiting = deadline.saturating_duration_since(Instant::now());
    let timeout = first.set_read_timeout(Some(waiting.max(RETRY)));
    timeout.map_err(|e| network("wait for", 0, e))?;
    let table = read_frame(&mut first).map_err(|e| Error::Rank {
        rank: 0,
        why: format!("it does not tell where the others are ({e}); are all of them started?"),
    })?;
    let addresses: Vec<Option<SocketAddr>> = Received::only(0, &table.1)?;
    let (mut streams, _) = accept_after(at, &listener, &addresses, hello, deadline)?;
    streams[0] = Some(first);
    Ok(streams)
}

/// Connects to the ranks between 0 and this one, and waits for those after it.
fn accept_after(
    at: &Rendezvous,
    listener: &TcpListener,
    addresses: &[Option<SocketAddr>],
    hello: impl Fn(&mut TcpStream, usize) -> Result<()>,
    deadline: Instant,
) -> Result<Accepted> {
    let mut before = Vec::new();
    for rank in 1..at.rank {
        let address = addresses.get(rank).copied().flatten();
        let address = address.ok_or_else(|| Error::Rank {
            rank: 0,
            why: format!("it does not tell where rank {rank} is"),
        })?;
        let mut stream = reach(&|| Ok(vec![address]), rank, deadline)?;
        hello(&mut stream, rank)?;
        before.push((rank, stream));
    }
    let (mut streams, addresses) = accept(listener, at, at.rank + 1, deadline)?;
    for (rank, stream) in before {
        streams[rank] = Some(stream);
    }
    Ok((streams, addresses))
}

/// By rank: the connection, and where the rank listens.
type Accepted = (Vec<Option<TcpStream>>, Vec<Option<SocketAddr>>);

/// Waits for the ranks from `first` on.
fn accept(
    listener: &TcpListener,
    at: &Rendezvous,
    first: usize,
    deadline: Instant,
) -> Result<Accepted> {
    let failed = |e| network("wait for ranks at", at.rank, e);
    listener.set_nonblocking(true).map_err(failed)?;
    let mut streams: Vec<Option<TcpStream>> = (0..at.n_ranks).map(|_| None).collect();
    let mut addresses = vec![None; at.n_ranks];
    while let Some(missing) = (first..at.n_ranks).find(|rank| streams[*rank].is_none()) {
        if Instant::now() > deadline {
            let why = format!("it has not come within {} s", at.patience.as_secs());
            return Err(Error::Rank { rank: missing, why });
        }
        let (stream, address) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                thread::sleep(RETRY);
                continue;
            }
            Err(e) => return Err(failed(e)),
        };
        // Somebody who does not know the greeting is not one of us.
        let Some(hello) = read_hello(&stream) else {
            continue;
        };
        let rank = hello.rank as usize;
        if hello.version != VERSION || hello.n_ranks as usize != at.n_ranks {
            let why = format!(
                "it is one of {} by version {} of the protocol, this is one of {} by version {VERSION}",
                hello.n_ranks, hello.version, at.n_ranks
            );
            return Err(Error::Rank { rank, why });
        }
        if rank < first || rank >= at.n_ranks || streams[rank].is_some() {
            let why = "it is there twice: every rank needs a number of its own".into();
            return Err(Error::Rank { rank, why });
        }
        addresses[rank] = Some(SocketAddr::new(address.ip(), hello.port));
        streams[rank] = Some(stream);
    }
    Ok((streams, addresses))
}

struct Hello {
    version: u32,
    rank: u32,
    n_ranks: u32,
    port: u16,
}

fn hello_of(at: &Rendezvous, port: u16) -> Vec<u8> {
    let numbers = [VERSION, at.rank as u32, at.n_ranks as u32, port.into()];
    let numbers = numbers.iter().flat_map(|n| n.to_le_bytes());
    MAGIC.iter().copied().chain(numbers).collect()
}

fn read_hello(mut stream: &TcpStream) -> Option<Hello> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(HELLO_TIME)).ok()?;
    let mut bytes = [0; HELLO];
    stream.read_exact(&mut bytes).ok()?;
    let numbers = bytes.strip_prefix(MAGIC)?;
    let (numbers, _) = numbers.as_chunks::<4>();
    let numbers: Vec<u32> = numbers.iter().map(|n| u32::from_le_bytes(*n)).collect();
    let [version, rank, n_ranks, port] = numbers[..] else {
        return None;
    };
    Some(Hello {
        version,
        rank,
        n_ranks,
        port: u16::try_from(port).ok()?,
    })
}

/// Listens where all will come; on all addresses if the name is not one of this machine's own.
fn listener(host: &str, port: u16) -> Result<TcpListener> {
    let own = resolve(host, port).unwrap_or_default();
    let any = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
    let bound = own.into_iter().chain([any]).map(TcpListener::bind);
    let mut refused = None;
    for bound in bound {
        match bound {
            Ok(listener) => return Ok(listener),
            Err(e) => refused = refused.or(Some(e)),
        }
    }
    Err(Error::Network {
        place: format!("port {port} of {host}"),
        action: "listen at",
        source: refused.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into()),
    })
}

fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok((host, port).to_socket_addrs()?.collect())
}

/// Connects to a rank that may not be there yet.
fn reach(
    addresses: &dyn Fn() -> io::Result<Vec<SocketAddr>>,
    rank: usize,
    deadline: Instant,
) -> Result<TcpStream> {
    loop {
        let failed = match addresses().and_then(|all| TcpStream::connect(&all[..])) {
            Ok(stream) => return Ok(stream),
            Err(e) => e,
        };
        if Instant::now() > deadline {
            return Err(network("reach", rank, failed));
        }
        thread::sleep(RETRY);
    }
}

fn network(action: &'static str, rank: usize, source: io::Error) -> Error {
    Error::Network {
        place: format!("rank {rank}"),
        action,
        source,
    }
}
