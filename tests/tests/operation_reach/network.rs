//! Operations on sockets.

use super::*;

impl Lab {
    pub(super) fn network(&mut self, operation: Operation) -> Result<Reach> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = socket_address(&listener)?;
        let at = address.as_ptr().addr() as u64;
        let mut buffer = *SECRET;
        let data = buffer.as_mut_ptr().addr() as u64;
        match operation {
            Operation::SOCKET => {
                // AF_INET, SOCK_STREAM.
                let made = self.succeed(Sqe { fd: 2, off: 1, ..self.sqe() })?;
                ensure!(own(made)?.is_some(), "no new descriptor");
                Ok(Reach::NETWORK | Reach::OTHER_FILES)
            }
            Operation::BIND => {
                let socket = socket()?;
                let any = [&[2, 0, 0, 0, 127, 0, 0, 1][..], &[0; 8]].concat();
                let any = any.as_ptr().addr() as u64;
                let fd = socket.as_raw_fd();
                Ok(Reach::NETWORK | self.reads(any, |sqe, addr| Sqe { fd, addr, off: 16, ..sqe })?)
            }
            Operation::LISTEN => {
                self.succeed(Sqe { fd: socket()?.as_raw_fd(), len: 1, ..self.sqe() })?;
                Ok(Reach::NETWORK)
            }
            Operation::CONNECT => {
                let socket = socket()?;
                let fd = socket.as_raw_fd();
                let reads = self.reads(at, |sqe, addr| Sqe { fd, addr, off: 16, ..sqe })?;
                listener.accept()?;
                Ok(Reach::NETWORK | reads)
            }
            Operation::ACCEPT => {
                let _client = TcpStream::connect(listener.local_addr()?)?;
                let (mut peer, mut len) = ([0u8; 16], 16u32);
                let (addr, off) = (peer.as_mut_ptr().addr() as u64, (&raw mut len).addr() as u64);
                let accepted = self.succeed(Sqe { fd: listener.as_raw_fd(), addr, off, ..self.sqe() })?;
                ensure!(own(accepted)?.is_some(), "no new descriptor");
                ensure!(std::hint::black_box(peer) != [0; 16], "nothing was written");
                Ok(Reach::NETWORK | Reach::OTHER_FILES | Reach::WRITES_MEMORY)
            }
            Operation::SHUTDOWN => {
                let (ours, mut theirs) = UnixStream::pair()?;
                self.succeed(Sqe { fd: ours.as_raw_fd(), len: 2, ..self.sqe() })?;
                ensure!(theirs.read(&mut [0])? == 0, "the socket is still open");
                Ok(Reach::NETWORK)
            }
            Operation::URING_CMD => self.socket_commands(),
            _ => {
                let mut client = TcpStream::connect(listener.local_addr()?)?;
                let (mut server, _) = listener.accept()?;
                let iovec = [data, 16];
                let message = [0, 0, iovec.as_ptr().addr() as u64, 1, 0, 0, 0];
                let list = message.as_ptr().addr() as u64;
                let fd = client.as_raw_fd();
                let has_message = matches!(operation, Operation::SENDMSG | Operation::SENDMSG_ZC | Operation::RECVMSG);
                let request = if has_message {
                    Sqe { fd, addr: list, len: 1, ..self.sqe() }
                } else {
                    Sqe { fd, addr: data, len: 16, ..self.sqe() }
                };
                let mut shown = Reach::NETWORK;
                if matches!(operation, Operation::RECV | Operation::RECVMSG) {
                    server.write_all(b"from the network")?;
                    if has_message {
                        let bad = self.run(Sqe { addr: UNMAPPED, ..request })?;
                        ensure!(bad == -EFAULT, "an unmapped address gave {bad}");
                        shown |= Reach::READS_MEMORY;
                    }
                    ensure!(self.succeed(request)? == 16);
                    ensure!(&std::hint::black_box(buffer) == b"from the network", "nothing was written");
                    shown |= Reach::WRITES_MEMORY;
                } else {
                    ensure!(self.succeed(request)? == 16);
                    let mut received = [0; 16];
                    server.read_exact(&mut received)?;
                    ensure!(&received == SECRET, "received {received:?}");
                    shown |= Reach::READS_MEMORY;
                }
                client.flush()?;
                Ok(shown)
            }
        }
    }

    /// `SOCKET_URING_OP_GETSOCKOPT` and `SETSOCKOPT` (Linux 6.7): commands of a socket, on memory of the owner.
    fn socket_commands(&mut self) -> Result<Reach> {
        const SOL_SOCKET: u64 = 1;
        const SO_TYPE: u64 = 3;
        const SO_SNDBUF: u64 = 7;
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let mut value = 0u32;
        let at = (&raw mut value).addr() as u64;
        let request = Sqe { fd: socket.as_raw_fd(), file_index: 4, addr3: at, ..self.sqe() };
        let got = self.run(Sqe { off: 2, addr: SOL_SOCKET | (SO_TYPE << 32), ..request })?;
        if got == -95 {
            bail!("sockets have no commands on this kernel");
        }
        ensure!(got == 4 && std::hint::black_box(value) == 2, "{got}: the memory is {value}");
        let set = Sqe { off: 3, addr: SOL_SOCKET | (SO_SNDBUF << 32), ..request };
        let reads = self.reads(at, |_, addr3| Sqe { addr3, ..set })?;
        Ok(Reach::DRIVER_COMMANDS | Reach::WRITES_MEMORY | reads)
    }
}

fn socket() -> Result<OwnedFd> {
    let (family, kind) = (rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM);
    Ok(rustix::net::socket_with(family, kind, rustix::net::SocketFlags::CLOEXEC, None)?)
}

/// `struct sockaddr_in`.
fn socket_address(listener: &TcpListener) -> Result<[u8; 16]> {
    let port = listener.local_addr()?.port().to_be_bytes();
    let mut address = [0; 16];
    address[..8].copy_from_slice(&[2, 0, port[0], port[1], 127, 0, 0, 1]);
    Ok(address)
}
