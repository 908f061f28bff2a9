//! Ranks that are threads of one process.

use super::{Communicator, Meter, Traffic};
use crate::{Error, Result};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

/// A rank that reaches the others by channels. Each goes to a thread of its own; one that is dropped
/// is lost to the others.
#[derive(Debug)]
pub struct Local {
    rank: usize,
    /// By rank.
    senders: Vec<Sender<Vec<u8>>>,
    /// By rank; nobody else holds them, the lock is there to share them between threads.
    receivers: Vec<Mutex<Receiver<Vec<u8>>>>,
    meter: Meter,
}

impl Local {
    /// As many ranks as are asked for, by rank.
    pub fn ranks(n_ranks: usize) -> Vec<Self> {
        let mut senders: Vec<Vec<Sender<Vec<u8>>>> = vec![Vec::new(); n_ranks];
        let mut ranks = Vec::new();
        for rank in 0..n_ranks {
            let mut receivers = Vec::new();
            for from in &mut senders {
                let (sender, receiver) = channel();
                from.push(sender);
                receivers.push(Mutex::new(receiver));
            }
            ranks.push((rank, receivers));
        }
        let ranks = ranks.into_iter().zip(senders);
        let ranks = ranks.map(|((rank, receivers), senders)| Self {
            rank,
            senders,
            receivers,
            meter: Meter::default(),
        });
        ranks.collect()
    }
}

impl Local {
    fn exchange(&self, outgoing: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        let lost = |rank| Error::RankLost {
            rank,
            why: "it has ended".into(),
        };
        for (to, bytes) in outgoing.iter().enumerate() {
            if to != self.rank {
                let sent = self.senders[to].send(bytes.to_vec());
                sent.map_err(|_| lost(to))?;
            }
        }
        let receivers = self.receivers.iter().enumerate();
        let received = receivers.map(|(from, receiver)| match from == self.rank {
            true => Ok(Vec::new()),
            false => {
                let receiver = receiver.lock().unwrap_or_else(|e| e.into_inner());
                receiver.recv().map_err(|_| lost(from))
            }
        });
        received.collect()
    }
}

impl Communicator for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn n_ranks(&self) -> usize {
        self.senders.len()
    }

    fn all_to_all(&self, outgoing: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        self.meter
            .measure(self.rank, outgoing, || self.exchange(outgoing))
    }

    /// The others notice that it is gone when it is dropped.
    fn abort(&self, _: &Error) {}

    fn traffic(&self) -> Traffic {
        self.meter.total()
    }
}
