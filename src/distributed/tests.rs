use super::*;
use crate::Error;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Each rank does `work` in a thread of its own.
fn together<C: Communicator, T: Send>(
    ranks: Vec<C>,
    work: impl Fn(&dyn Communicator) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|rank| scope.spawn(move || work(&rank)))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn meeting(rank: usize, n_ranks: usize, port: u16) -> Rendezvous {
    Rendezvous {
        rank,
        n_ranks,
        host: "127.0.0.1".into(),
        port,
        patience: Duration::from_secs(20),
    }
}

fn tcp_ranks(n_ranks: usize) -> Vec<Tcp> {
    let port = free_port();
    // The last first: whoever comes early waits.
    let connecting: Vec<_> = (0..n_ranks)
        .rev()
        .map(|rank| {
            let at = meeting(rank, n_ranks, port);
            std::thread::spawn(move || Tcp::connect(&at, |_| {}).unwrap())
        })
        .collect();
    connecting
        .into_iter()
        .rev()
        .map(|t| t.join().unwrap())
        .collect()
}

/// What every communicator must do.
fn laws(rank: &dyn Communicator) -> u64 {
    let (own, n) = (rank.rank(), rank.n_ranks());
    for round in 0..20usize {
        // Messages of all lengths, none and more than a socket takes at once among them.
        let length = |from: usize, to: usize| (from * 7 + to * 3 + round) % 5 * 300_000;
        let outgoing: Vec<Vec<u8>> = (0..n)
            .map(|to| vec![(own * n + to + round) as u8; length(own, to)])
            .collect();
        let outgoing: Vec<&[u8]> = outgoing.iter().map(Vec::as_slice).collect();
        let received = rank.all_to_all(&outgoing).unwrap();
        for (from, bytes) in received.iter().enumerate() {
            let expected = match from == own {
                true => Vec::new(),
                false => vec![(from * n + own + round) as u8; length(from, own)],
            };
            assert!(*bytes == expected, "from {from} to {own} in round {round}");
        }
    }
    let before = rank.traffic().bytes_sent;
    let all = rank.all_gather(vec![own as u8; own + 1]).unwrap();
    let expected = (0..n).map(|from| vec![from as u8; from + 1]);
    assert!(all.into_iter().eq(expected));
    assert_eq!(
        rank.traffic().bytes_sent - before,
        ((n - 1) * (own + 1)) as u64
    );
    let told = rank.broadcast_value(|| Ok(format!("from {own}"))).unwrap();
    assert_eq!(told, "from 0");
    let all = rank.all_gather_value(&(own, own as f64 / 3.0)).unwrap();
    assert!(all.into_iter().eq((0..n).map(|r| (r, r as f64 / 3.0))));
    rank.traffic().bytes_sent
}

#[test]
fn threads_and_sockets_carry_alike() {
    assert_eq!(laws(&Alone), 0);
    for n in [2, 3, 5] {
        let local = together(Local::ranks(n), laws);
        assert_eq!(local, together(tcp_ranks(n), laws));
    }
}

#[test]
fn a_rank_that_is_gone_is_noticed_by_who_waits_for_another() {
    let errors = together(Local::ranks(3), |rank| match rank.rank() {
        2 => None,
        _ => rank.all_gather(vec![1]).err(),
    });
    assert!(matches!(errors[1], Some(Error::RankLost { .. })));
}

#[test]
fn a_run_that_is_ended_says_why_also_to_who_computes() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let port = free_port();
    let connect = |rank| {
        let heard = Arc::clone(&heard);
        let on_loss = move |e: &Error| heard.lock().unwrap().push((rank, e.to_string()));
        Tcp::connect(&meeting(rank, 3, port), on_loss).unwrap()
    };
    let ranks = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|r| scope.spawn(move || connect(r))).collect();
        let ranks = threads.into_iter().map(|t| t.join().unwrap());
        ranks.collect::<Vec<Tcp>>()
    });
    // Rank 1 waits, rank 0 computes, rank 2 gives up.
    let said = "rank 2: model.layers.3: 1 value(s) are NaN or infinite in hessian";
    together(ranks, |rank| match rank.rank() {
        2 => rank.abort(&Error::NotFinite {
            module: "model.layers.3".into(),
            stage: "hessian".into(),
            count: 1,
        }),
        1 => {
            let error = rank.all_gather(vec![]).unwrap_err();
            assert_eq!(error.to_string(), said);
        }
        _ => std::thread::sleep(Duration::from_secs(2)),
    });
    let mut heard = heard.lock().unwrap().clone();
    heard.sort();
    assert_eq!(heard, [(0, said.to_owned()), (1, said.to_owned())]);
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let mut at = meeting(0, 2, free_port());
    at.patience = Duration::from_millis(300);
    let began = Instant::now();
    let error = Tcp::connect(&at, |_| {}).err().unwrap();
    assert!(matches!(error, Error::Rank { rank: 1, .. }), "{error}");
    at.rank = 1;
    at.port = free_port();
    let error = Tcp::connect(&at, |_| {}).err().unwrap();
    assert!(matches!(error, Error::Network { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[test]
fn strangers_and_ranks_of_another_run_are_told_from_ours() {
    use std::io::Write;
    use std::net::TcpStream;
    let port = free_port();
    let first = std::thread::spawn(move || Tcp::connect(&meeting(0, 2, port), |_| {}));
    let stranger = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => break stream,
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    (&stranger).write_all(&[b'x'; 64]).unwrap();
    let second = Tcp::connect(&meeting(1, 2, port), |_| {});
    assert!(second.is_ok() && first.join().unwrap().is_ok());

    let port = free_port();
    let first = std::thread::spawn(move || Tcp::connect(&meeting(0, 2, port), |_| {}));
    let _other = Tcp::connect(&meeting(1, 3, port), |_| {});
    let error = first.join().unwrap().err().unwrap().to_string();
    assert!(error.contains("it is one of 3"), "{error}");
}
