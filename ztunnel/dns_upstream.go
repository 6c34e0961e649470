package ztunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/netns"
)

var errNoResolver = errors.New("no resolver is known")

// askFirst asks one resolver after the other until one answers.
func askFirst(ctx context.Context, upstreams []netip.AddrPort, ask func(context.Context, netip.AddrPort) ([]byte, error)) ([]byte, error) {
	err := errNoResolver
	for _, upstream := range upstreams {
		var message []byte
		if message, err = ask(ctx, upstream); err == nil {
			return message, nil
		}
	}
	return nil, err
}

// askByPacket asks a resolver by UDP from inside the pod. The query keeps its id; the port that it comes from is new each
// time, only packets of the resolver arrive there, and what does not answer the query is passed over. An answer that was
// cut short (TC) is the client's to ask for again by TCP.
func (r *resolver) askByPacket(ctx context.Context, ns *os.File, upstream netip.AddrPort, q query) ([]byte, error) {
	conn, err := netns.DialPacket(ctx, ns, netns.ProxyMark, upstream)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := conn.SetDeadline(time.Now().Add(dnsTimeout)); err != nil {
		return nil, err
	}
	if _, err := conn.Write(q.message); err != nil {
		return nil, err
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	for {
		message, err := r.receivePacket(raw)
		if err != nil {
			return nil, fmt.Errorf("ask resolver %s: %w", upstream, err)
		}
		if q.isAnswer(message) {
			return message, nil
		}
	}
}

// receivePacket waits for a packet. A buffer is taken only when there is something to read, so that queries that wait hold
// none.
func (r *resolver) receivePacket(raw syscall.RawConn) (message []byte, err error) {
	var received error
	err = raw.Read(func(fd uintptr) bool {
		buf := r.packets.Get().(*[dns.MaxMsgSize]byte)
		defer r.packets.Put(buf)
		var n int
		n, received = unix.Read(int(fd), buf[:])
		if errors.Is(received, unix.EAGAIN) || errors.Is(received, unix.EINTR) {
			return false
		}
		if received == nil {
			message = append([]byte(nil), buf[:n]...)
		}
		return true
	})
	return message, errors.Join(err, received)
}

// upstreamConn is a connection to a resolver, made when it is first needed and again when the resolver has closed it.
type upstreamConn struct {
	dial func(context.Context) (*net.TCPConn, error)
	conn *net.TCPConn
}

// ask sends one query and waits for its answer.
func (u *upstreamConn) ask(ctx context.Context, q query) ([]byte, error) {
	used := u.conn != nil
	message, err := u.askOnce(ctx, q)
	if err != nil && used {
		message, err = u.askOnce(ctx, q)
	}
	return message, err
}

func (u *upstreamConn) askOnce(ctx context.Context, q query) ([]byte, error) {
	message, err := u.exchange(ctx, q)
	if err != nil {
		u.close()
	}
	return message, err
}

func (u *upstreamConn) exchange(ctx context.Context, q query) ([]byte, error) {
	if err := u.send(ctx, q); err != nil {
		return nil, err
	}
	message, err := readMessage(u.conn)
	if err != nil {
		return nil, err
	}
	if !q.isAnswer(message) {
		return nil, errors.New("the resolver has answered something else")
	}
	return message, nil
}

// send sends a query, on a new connection if there is none.
func (u *upstreamConn) send(ctx context.Context, q query) error {
	ctx, cancel := context.WithTimeout(ctx, dnsTimeout)
	defer cancel()
	if u.conn == nil {
		conn, err := u.dial(ctx)
		if err != nil {
			return err
		}
		u.conn = conn
	}
	if err := u.conn.SetDeadline(time.Now().Add(dnsTimeout)); err != nil {
		return err
	}
	return writeMessage(u.conn, q.message)
}

func (u *upstreamConn) close() {
	if u.conn != nil {
		u.conn.Close()
		u.conn = nil
	}
}

// readMessage reads a message from a TCP connection, where its length goes before it (RFC 1035, section 4.2.2).
func readMessage(conn io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return nil, err
	}
	message := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(conn, message)
	return message, err
}

func writeMessage(conn io.Writer, message []byte) error {
	framed := binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(message)), uint16(len(message)))
	_, err := conn.Write(append(framed, message...))
	return err
}
