package hbone

import (
	"crypto/tls"
	"io"
	"net"
	"syscall"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/hbone/machine"
	"github.com/fairlead-mesh/fairlead/internal/loop"
	"github.com/fairlead-mesh/fairlead/internal/tlsrecord"
)

// The end of a tunnel's connection. A socket that is closed with bytes unread, or that gets more after its close, answers
// with a reset, and its kernel throws away what it has not sent yet: the last bytes of streams, the GOAWAY that says what
// the peer did wrong. So the tunnel ends its own direction, and takes and forgets what the peer sends until the peer ends
// too (the lingering close of RFC 9112 §9.6), or has all that was sent, or takes no more of it.

const (
	farewellLook = time.Second      // how often a farewell looks what the peer has taken
	farewellMax  = 30 * time.Second // for a peer that takes it slowly
	farewellGulp = 1 << 20          // bytes forgotten before others have their turn, and of a peer that has all
)

// lost ends the tunnel because of what the peer sent: the end of the connection, or something wrong that it is told of.
func (t *loopTunnel) lost(err error) {
	if err == io.EOF && t.m.Streams() == 0 {
		err = nil
	}
	t.fail(err)
}

// fail ends the tunnel and its streams; nil is a quiet end. What the peer should know is still sent: GOAWAY, the alert for a
// bad record, close_notify.
func (t *loopTunnel) fail(err error) {
	if t.dead {
		t.cut = err // of one that stands still, for resume
		return
	}
	last := t.lastWords(err)
	t.dead, t.err = true, err
	if t.timer != nil {
		t.timer.Stop()
	}
	lost := err
	if lost == nil {
		lost = io.EOF
	}
	t.m.Each(func(ms *machine.Stream) { t.endStream(ms.User.(*Stream), &TunnelError{Err: lost}) })
	t.spaceApps, t.spaceStreams, t.windowApps, t.blocked, t.tail = nil, nil, nil, nil, nil
	t.window.close()
	t.rec.Clear()
	if t.buf != nil {
		t.w.freeSendBuffer(t.buf)
		t.buf = nil
	}
	t.tc.events.draining()
	t.w.sayFarewell(t.fd, last, func() { t.tc.events.ended(err) })
}

// farewell is the connection of a loopTunnel that is over.
type farewell struct {
	w        *worker
	fd       int
	out      []byte // not sent yet
	shut     bool
	left     int // what the peer had not acknowledged at the last look, in bytes
	deadline time.Time
	timer    *time.Timer
	done     func() // the connection is closed
}

// sayFarewell takes over fd, which is on the loop, sends out and closes it in the end.
func (w *worker) sayFarewell(fd int, out []byte, done func()) {
	f := &farewell{w: w, fd: fd, out: out, left: -1, deadline: time.Now().Add(farewellMax), done: done}
	w.loop.Replace(fd, f)
	f.timer = time.AfterFunc(farewellLook, func() { w.loop.Post(f.look) })
	f.send()
	f.forget()
}

// Ready takes the socket's events.
func (f *farewell) Ready(uint32) {
	f.send()
	f.forget()
}

func (f *farewell) send() {
	for len(f.out) > 0 && f.fd >= 0 {
		n, errno := loop.Write(f.fd, f.out)
		switch errno {
		case 0, syscall.EINTR:
			f.out = f.out[n:]
		case syscall.EAGAIN:
			return
		default:
			f.close()
			return
		}
	}
	if f.fd >= 0 && !f.shut {
		f.shut, f.out = true, nil
		loop.ShutdownWrite(f.fd)
	}
}

// forget takes what the peer sends.
func (f *farewell) forget() {
	for gulp := farewellGulp; f.fd >= 0; {
		n, errno := loop.Discard(f.fd, gulp)
		switch {
		case errno == syscall.EINTR:
		case errno == syscall.EAGAIN:
			return
		case errno != 0 || n == 0:
			f.close()
		case n == gulp && loop.Unacknowledged(f.fd)+len(f.out) == 0:
			f.close()
		case n == gulp:
			f.w.loop.Post(f.forget)
			return
		default:
			gulp -= n
		}
	}
}

// look ends it when nothing is left to wait for: the peer's kernel has all of it, or has taken none of it since the last
// look, or it is too slow.
func (f *farewell) look() {
	if f.fd < 0 {
		return
	}
	left := loop.Unacknowledged(f.fd) + len(f.out)
	if left == 0 || left == f.left || time.Now().After(f.deadline) {
		f.close()
		return
	}
	f.left = left
	f.timer.Reset(farewellLook)
}

func (f *farewell) close() {
	f.timer.Stop()
	f.w.loop.Close(f.fd)
	f.fd, f.out = -1, nil
	f.done()
}

// sayFarewell does the same for a goTunnel, and returns when the connection is closed.
func sayFarewell(nc net.Conn, last []byte) {
	defer nc.Close()
	_ = nc.SetWriteDeadline(time.Now().Add(farewellLook))
	if _, err := nc.Write(last); err != nil {
		return
	}
	c, ok := nc.(*tls.Conn)
	if !ok {
		return
	}
	_ = c.CloseWrite() // an error shows in what follows
	tcp, ok := c.NetConn().(*net.TCPConn)
	if !ok || tcp.CloseWrite() != nil {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	for before, end := -1, time.Now().Add(farewellMax); time.Now().Before(end); {
		_ = tcp.SetReadDeadline(time.Now().Add(farewellLook))
		_, err := io.CopyN(io.Discard, tcp, farewellGulp)
		if err != nil && !timedOut(err) {
			return
		}
		left := 0
		_ = raw.Control(func(fd uintptr) { left = loop.Unacknowledged(int(fd)) })
		if left == 0 || err != nil && left == before {
			return
		}
		before = left
	}
}

// timedOut says that err is a deadline's.
func timedOut(err error) bool {
	ne, ok := err.(net.Error)
	return ok && ne.Timeout()
}

// lastWords is all that the peer should still get: the records under way, the machine's last frames, and the alert that
// belongs to err or close_notify.
func (t *loopTunnel) lastWords(err error) []byte {
	t.control()
	t.seal()
	var out []byte
	if t.buf != nil {
		out = append(out, t.buf[t.sent:t.sealed]...)
	}
	for b := t.m.Output(); len(b) > 0; b = t.m.Output() {
		n := min(len(b), tlsrecord.MaxPlain)
		at := len(out)
		out = append(out, make([]byte, tlsrecord.HeaderLen+n+tlsrecord.TailLen)...)
		copy(out[at+tlsrecord.HeaderLen:], b[:n])
		t.rec.Seal(out[at:], n)
		t.m.Flushed(n)
	}
	return t.rec.AppendAlert(out, err)
}
