//! A front-end with rings disconnects at any message of its session, or in the middle of one. The broker keeps nothing
//! of it.

use std::{os::fd::AsFd, process::ExitCode};

use anyhow::{Context, Result, bail, ensure};
use ringpass_tests::{
    broker_process::{self, BrokerProcess},
    disks::DiskKind,
    front_end::{
        attach::{
            RingDriver,
            bench::{QUEUE_SIZE, start_again, start_queue_zero, start_ring},
        },
        blk::SECTOR_BYTES,
        connection::Connection,
        event::Event,
        ram::RamRegion,
        rig::{Rig, TestRam},
        session::{FrontEnd, Options},
        wire::{Cut, CutAt, is_cut},
    },
    harness::{self, test},
};
use vhost::vhost_user::message::FrontendReq;

const DISK_BYTES: u64 = 16 << 20;

fn main() -> ExitCode {
    let needs = DiskKind::Ext4Direct.needs().into_iter().chain(broker_process::needs());
    harness::run(vec![test(
        "the_broker_keeps_nothing_of_a_front_end_that_disconnects_at_any_message",
        needs,
        cut_sessions,
    )])
}

/// Runs a whole session again and again, and cuts it at each of its messages in turn.
fn cut_sessions() -> Result<()> {
    let rig = Rig::new(DiskKind::Ext4Direct, DISK_BYTES)?;
    let broker = rig.broker(&["--mode", "direct", "--num-queues", "3"])?;
    let fds = broker.usage()?.fds;
    let messages = broker.explain(session(&rig, None))?;
    broker.explain(nothing_left(&rig, &broker, fds))?;
    let anonymous_bytes = broker.usage()?.anonymous_bytes;
    for message in 0..messages {
        for at in [CutAt::Within, CutAt::Behind] {
            let cut = Cut { message, at };
            let attempt = || -> Result<()> {
                match session(&rig, Some(cut)) {
                    Err(error) if is_cut(&error) => {}
                    Err(error) => return Err(error),
                    Ok(_) => bail!("the session ended before the message at which it is cut"),
                }
                nothing_left(&rig, &broker, fds)
            };
            broker.explain(attempt().with_context(|| format!("cut {cut:?} of {messages}")))?;
        }
    }
    let grown_bytes = broker.usage()?.anonymous_bytes.saturating_sub(anonymous_bytes);
    eprintln!("{messages} messages, each cut twice; the broker has grown by {} KiB", grown_bytes >> 10);
    ensure!(grown_bytes < 4 << 20, "the broker has grown by {grown_bytes} bytes");
    Ok(())
}

/// Checks that the broker pins no memory, has as many descriptors as before, and serves the next front-end.
fn nothing_left(rig: &Rig, broker: &BrokerProcess, fds: usize) -> Result<()> {
    broker.wait_for_unpinned()?;
    broker.wait_for_fds(fds).context("after the session")?;
    let mut ram = TestRam::new(1, 1 << 20)?;
    let front_end = FrontEnd::connect(&rig.socket(), &ram.ram, Options::default())?;
    let mut driver = ram.driver(&front_end, 0, 4096)?;
    driver.read(DISK_BYTES / SECTOR_BYTES - 8, 4096)?;
    drop(front_end);
    broker.wait_for_fds(fds).context("after the next front-end")
}

/// Runs a session, which ends at `cut` if there is one, and returns the number of its messages.
fn session(rig: &Rig, cut: Option<Cut>) -> Result<usize> {
    let mut ram = TestRam::new(1, 4 << 20)?;
    let connection = Connection::open_until(&rig.socket(), cut)?;
    let front_end = FrontEnd::negotiate(connection, &ram.ram, Options::default())?;
    let connection = front_end.connection();
    let _region = front_end.new_inflight_region(3, QUEUE_SIZE)?;
    let mut queue_zero = start_queue_zero(&front_end, &mut ram)?;
    queue_zero.post_event()?;
    let mut drivers = Vec::new();
    for index in 1..3 {
        let mut driver = start_ring(&front_end, &mut ram, index)?;
        driver.attach()?;
        drivers.push(driver);
    }
    let mut is_busy = || drivers.iter_mut().try_for_each(keep_busy);

    is_busy()?;
    let call = Event::new()?;
    connection.set_vring_fd(FrontendReq::SET_VRING_CALL, 1, Some(call.as_fd()))?;
    is_busy()?;
    let more = RamRegion::new(1 << 30, 1 << 20)?;
    connection.add_mem_reg(&more.message(), more.file())?;
    is_busy()?;
    connection.rem_mem_reg(&more.message(), Some(more.file()))?;
    is_busy()?;
    connection.set_vring(FrontendReq::SET_VRING_ENABLE, 2, 0)?;
    connection.set_vring(FrontendReq::SET_VRING_ENABLE, 2, 1)?;
    is_busy()?;
    for (index, driver) in (1..).zip(&mut drivers) {
        front_end.stop_vring(index)?;
        start_again(&front_end, driver.vring(), index)?;
        driver.wait_open()?;
        keep_busy(driver)?;
    }
    for index in [2, 0, 1] {
        front_end.stop_vring(index)?;
    }
    Ok(connection.wire().sent())
}

/// Submits requests until eight are outstanding.
fn keep_busy(driver: &mut RingDriver) -> Result<()> {
    driver.look()?;
    driver.reap();
    while driver.pop_completion().is_some() {}
    let next = driver.outstanding().iter().map(|sqe| sqe.user_data + 1).max().unwrap_or(0);
    for request in next..next + 8 - (driver.outstanding().len() as u64).min(8) {
        driver.submit(driver.sqe(true, request, 4096, request % 1024 * 4096, request)?)?;
    }
    Ok(())
}
