package load

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// requestText and responseText are what PortRequest speaks.
var (
	requestText  = "GET / HTTP/1.1\r\nHost: bench\r\nUser-Agent: bench\r\n\r\n"
	responseText = "HTTP/1.1 200 OK\r\nServer: bench\r\nContent-Type: text/plain\r\nContent-Length: 128\r\n\r\n" + strings.Repeat("x", 128)
)

// serve serves all ports until the process is ended.
func serve() error {
	sink, err := net.Listen("tcp4", fmt.Sprintf(":%d", PortSink))
	if err != nil {
		return err
	}
	go serveSink(sink)
	s := &server{ports: map[int]uint16{}, conns: map[int]uint16{}, buffer: make([]byte, 64<<10)}
	if s.poller, err = newPoller(); err != nil {
		return err
	}
	for _, port := range []uint16{PortEcho, PortOnce, PortRequest} {
		if err := s.listen(port); err != nil {
			return fmt.Errorf("listen on port %d: %w", port, err)
		}
	}
	fmt.Fprintln(os.Stderr, "serving")
	for {
		events, err := s.poller.wait(-1)
		if err != nil {
			return err
		}
		for _, e := range events {
			fd := int(e.Fd)
			if port, ok := s.ports[fd]; ok {
				s.accept(fd, port)
			} else if !s.answer(fd, s.conns[fd]) {
				delete(s.conns, fd)
				unix.Close(fd)
			}
		}
	}
}

// serveSink counts the bytes of each connection and tells their number at their end.
func serveSink(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			buffer := make([]byte, 128<<10)
			var total uint64
			for {
				n, err := conn.Read(buffer)
				total += uint64(n)
				if err != nil {
					break
				}
			}
			_, _ = conn.Write(binary.BigEndian.AppendUint64(nil, total)) // the client reports a short answer
		}()
	}
}

type server struct {
	poller *poller
	ports  map[int]uint16 // of listeners
	conns  map[int]uint16
	buffer []byte
}

func (s *server) listen(port uint16) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(port)}); err != nil {
		return err
	}
	if err := unix.Listen(fd, 4096); err != nil {
		return err
	}
	s.ports[fd] = port
	return s.poller.add(fd, unix.EPOLLIN)
}

func (s *server) accept(listener int, port uint16) {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err != nil {
			return
		}
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) // slower without, and seen in the figures
		if s.poller.add(fd, unix.EPOLLIN) != nil {
			unix.Close(fd)
			continue
		}
		s.conns[fd] = port
	}
}

// answer is false when the connection is to be closed. Requests are small and come one at a time, so that one read takes
// one, and an answer always fits the socket's buffer.
func (s *server) answer(fd int, port uint16) bool {
	n, err := unix.Read(fd, s.buffer)
	if errors.Is(err, unix.EAGAIN) {
		return true
	}
	if err != nil || n == 0 {
		return false
	}
	switch port {
	case PortRequest:
		for range bytes.Count(s.buffer[:n], []byte("\r\n\r\n")) {
			if writeAll(fd, []byte(responseText)) != nil {
				return false
			}
		}
		return true
	case PortOnce:
		_ = writeAll(fd, s.buffer[:n]) // the client counts what it does not get
		return false
	}
	return writeAll(fd, s.buffer[:n]) == nil
}
