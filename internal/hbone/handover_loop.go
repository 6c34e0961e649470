package hbone

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/hbone/machine"
	"github.com/fairlead-mesh/fairlead/internal/loop"
	"github.com/fairlead-mesh/fairlead/internal/relay"
	"github.com/fairlead-mesh/fairlead/internal/tlsrecord"
)

// freezeRetry is how often a tunnel with streams that are being set up is looked at again.
const freezeRetry = 2 * time.Millisecond

// errFrozen is the error of a tunnel that stands still for another process, and of one that has gone there.
var errFrozen = errors.New("handed over to another process")

// waiting is a CONNECT that came while the tunnel is about to be handed over: nobody has looked at it.
type waiting struct {
	s  *Stream
	ev machine.Event
}

func (t *loopTunnel) freeze(ctx context.Context) (*Frozen, error) {
	type answer struct {
		f   *Frozen
		err error
	}
	try := make(chan answer, 1)
	for {
		if !t.w.loop.Post(func() { f, err := t.tryFreeze(); try <- answer{f, err} }) {
			return nil, ErrClosed
		}
		a := <-try
		if !errors.Is(a.err, errBusy) {
			return a.f, a.err
		}
		select {
		case <-time.After(freezeRetry):
		case <-ctx.Done():
			t.w.loop.Post(t.release)
			return nil, errBusy
		}
	}
}

// release hands the CONNECTs that were kept to whom they are for.
func (t *loopTunnel) release() {
	kept := t.kept
	t.keeping, t.kept = false, nil
	for _, k := range kept {
		k.s.mu.Lock()
		over := k.s.over
		k.s.mu.Unlock()
		if !over {
			t.tc.events.incoming(newIncoming(k.s, t, &k.ev))
		}
	}
}

// tryFreeze makes the tunnel stand still if every stream is relayed, or a CONNECT that nobody has looked at. Until then
// new CONNECTs are kept.
func (t *loopTunnel) tryFreeze() (*Frozen, error) {
	if t.flush(); t.dead {
		return nil, &TunnelError{Err: t.err}
	}
	t.keeping = t.tc.server
	f := &Frozen{Files: []int{t.fd}}
	var machines []*machine.Stream
	apps := t.apps()
	for _, a := range apps {
		if a.s.unsettled() {
			return nil, errBusy
		}
		machines = append(machines, a.s.ms)
		f.Streams, f.Files = append(f.Streams, a.s), append(f.Files, a.fd)
		f.State.Streams = append(f.State.Streams, a.state())
	}
	for _, k := range t.kept {
		if k.s.ms.Gone() {
			continue
		}
		machines = append(machines, k.s.ms)
		f.Streams = append(f.Streams, nil)
		f.State.Streams = append(f.State.Streams, k.state())
	}
	if len(machines) < t.m.Streams() {
		return nil, errBusy
	}
	var err error
	if f.State.HTTP2, err = t.m.Export(machines); err != nil {
		return nil, errBusy
	}
	if f.State.TLS, err = t.rec.Export(); err != nil {
		return nil, err
	}
	f.State.Peer, f.State.Partial = rawCertificates(t.info.tls), bytes.Clone(t.tail)
	if t.buf != nil {
		f.State.Unsent = bytes.Clone(t.buf[t.sent:t.sealed])
	}
	t.stand(apps)
	f.moved = func() { t.w.loop.Post(func() { t.moved(apps) }) }
	f.resume = func() { t.w.loop.Post(func() { t.resume(apps) }) }
	return f, nil
}

// apps lists the sockets that are relayed over the tunnel, those of streams that are over among them.
func (t *loopTunnel) apps() (apps []*loopApp) {
	t.w.loop.Each(func(h loop.Handler) {
		if a, ok := h.(*loopApp); ok && a.t == t && !a.closed {
			apps = append(apps, a)
		}
	})
	return apps
}

// unsettled says that something is wanted of the stream that is not done.
func (s *Stream) unsettled() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.wq) > 0 || s.wfin || s.cut || s.credit > 0
}

func (a *loopApp) state() StreamState {
	st := StreamState{Relayed: true, PeerEnd: a.inEnd, PeerEndPassed: a.shut, AppEnd: a.outEnd}
	st.Sent, st.Received = a.s.Counters()
	for _, p := range a.queue {
		st.Queue = append(st.Queue, p.b...)
	}
	a.s.mu.Lock()
	defer a.s.mu.Unlock()
	st.Status = a.s.status
	return st
}

func (k *waiting) state() StreamState {
	st := StreamState{Authority: k.ev.Authority, Header: k.ev.Header}
	k.s.mu.Lock()
	defer k.s.mu.Unlock()
	for _, b := range k.s.rq {
		st.Queue = append(st.Queue, b...)
	}
	st.PeerEnd = k.s.rerr != nil
	return st
}

// stand stops everything that the tunnel does: to all callers it is dead, with no end that anybody is told of.
func (t *loopTunnel) stand(apps []*loopApp) {
	t.dead, t.err = true, errFrozen
	if t.timer != nil {
		t.timer.Stop()
	}
	t.w.loop.Remove(t.fd)
	for _, a := range apps {
		t.w.loop.Remove(a.fd)
	}
}

// moved forgets what another process goes on with. Nothing is closed but this process's descriptors.
func (t *loopTunnel) moved(apps []*loopApp) {
	for _, a := range apps {
		a.closed = true
		for _, p := range a.queue {
			t.w.unpin(p.r)
		}
		a.queue = nil
		t.w.loop.Close(a.fd)
		a.s.forget()
	}
	for _, k := range t.kept {
		k.s.forget()
	}
	t.kept, t.spaceApps, t.spaceStreams, t.windowApps, t.blocked, t.tail = nil, nil, nil, nil, nil, nil
	t.w.loop.Close(t.fd)
	t.window.close()
	t.rec.Clear()
	if t.buf != nil {
		t.w.freeSendBuffer(t.buf)
		t.buf = nil
	}
	t.tc.events.ended(nil)
}

// forget ends a stream of which another process tells the end.
func (s *Stream) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over, s.rq = true, nil
	s.rerr, s.werr = ErrClosed, ErrClosed
	s.wakeReaders()
	s.wakeWriters()
}

// resume goes on where stand stopped. What happened to the sockets meanwhile comes as their first event.
func (t *loopTunnel) resume(apps []*loopApp) {
	t.dead, t.err = false, nil
	err := t.w.loop.Add(t.fd, t)
	if err == nil {
		err = t.cut
	}
	if err != nil {
		t.fail(err)
	} else if t.timer != nil {
		t.timer.Reset(t.tc.ping)
	}
	t.goOnAll(apps)
	t.markReading()
	t.mark()
}

// goOnAll begins or resumes the relay of all sockets. One of them may end the tunnel, and the tunnel the others; those
// whose streams are over outlive it.
func (t *loopTunnel) goOnAll(apps []*loopApp) {
	for _, a := range apps {
		if !a.closed {
			t.goOn(a)
		}
	}
	if !t.dead {
		t.release()
	}
}

// goOn begins or resumes the relay of a socket.
func (t *loopTunnel) goOn(a *loopApp) {
	if err := t.w.loop.Add(a.fd, a); err != nil {
		a.fail(err)
		return
	}
	t.serve(a.s) // it may have been cut meanwhile
	if a.closed {
		return
	}
	a.readable = true
	t.w.markApp(a)
	if len(a.queue) > 0 {
		a.drain()
	} else {
		a.wrote()
	}
}

func (d *LoopDriver) adopt(st *TunnelState, files []int, tc tunnelConfig) (*Adopted, error) {
	if err := st.check(len(files), tc.server); err != nil {
		return nil, err
	}
	m, machines, err := machine.Import(st.HTTP2)
	if err != nil {
		return nil, err
	}
	info := &connInfo{}
	if info.tls, err = st.tlsState(); err != nil {
		return nil, err
	}
	if info.local, info.remote, err = ends(files[0]); err != nil {
		return nil, err
	}
	for _, fd := range files {
		if err := unix.SetNonblock(fd, true); err != nil {
			return nil, fmt.Errorf("make socket non-blocking: %w", err)
		}
	}
	rec, err := tlsrecord.Import(st.TLS)
	if err != nil {
		return nil, err
	}
	t := newLoopTunnel(d.workers[d.next.Add(1)%uint32(len(d.workers))], files[0], rec, info, tc)
	t.m, t.tail = m, st.Partial
	t.window.adopt(st.HTTP2.Config.ConnWindow)
	a := &Adopted{t: t, remote: info.remote}
	var apps []*loopApp
	var kept []waiting
	for i := range st.Streams {
		s := t.adoptStream(&st.Streams[i], machines[i])
		if s.app == nil {
			kept = append(kept, waiting{s, machine.Event{Authority: st.Streams[i].Authority, Header: st.Streams[i].Header}})
			a.Streams = append(a.Streams, nil)
			continue
		}
		s.app.fd = files[1+len(apps)]
		apps = append(apps, s.app)
		a.Streams = append(a.Streams, s)
	}
	a.start = func(done func(int, relay.Result)) {
		for i, s := range a.Streams {
			if s != nil {
				s.app.done = func(r relay.Result) { done(i, r) }
			}
		}
		t.w.loop.Post(func() { t.beginAdopted(st.Unsent, apps, kept) })
	}
	a.discard = func() {
		t.window.close()
		rec.Clear()
		for _, fd := range files {
			unix.Close(fd)
		}
	}
	return a, nil
}

// adopt takes from Buffers what another process has granted already, even if that is more than there is.
func (w *window) adopt(granted int) {
	if w.from != nil && granted > leastWindow {
		w.taken = int64(granted - leastWindow)
		w.from.left.Add(-w.taken)
	}
}

// adoptStream makes a stream of another process's tunnel.
func (t *loopTunnel) adoptStream(st *StreamState, ms *machine.Stream) *Stream {
	s := newStream(t, t.info)
	s.ms, ms.User = ms, s
	if !st.Relayed {
		s.deliver(st.Queue, st.PeerEnd)
		return s
	}
	s.over, s.status = ms.Gone(), st.Status
	s.sent.Store(st.Sent)
	s.received.Store(st.Received)
	s.halfClosed.Store(st.PeerEnd || st.AppEnd)
	s.app = &loopApp{w: t.w, t: t, s: s, inEnd: st.PeerEnd, shut: st.PeerEndPassed, outEnd: st.AppEnd}
	if len(st.Queue) > 0 {
		s.app.queue = []piece{{b: st.Queue}}
	}
	return s
}

// beginAdopted lets an adopted tunnel go on, on its loop.
func (t *loopTunnel) beginAdopted(unsent []byte, apps []*loopApp, kept []waiting) {
	if len(unsent) > 0 {
		if t.buf = t.w.sendBuffer(); len(unsent) > len(t.buf)/2 {
			t.buf = make([]byte, len(unsent)+len(t.buf)) // of an older make, with larger sends
		}
		t.sealed = copy(t.buf, unsent)
	}
	t.kept = kept
	t.register()
	t.goOnAll(apps)
}

// ends are the addresses of a TCP connection.
func ends(fd int) (local, remote net.Addr, err error) {
	at, err := unix.Getsockname(fd)
	if err != nil {
		return nil, nil, fmt.Errorf("read the socket's address: %w", err)
	}
	to, err := unix.Getpeername(fd)
	if err != nil {
		return nil, nil, fmt.Errorf("read the peer's address: %w", err)
	}
	if local = tcpAddr(at); local == nil {
		return nil, nil, errors.New("not a TCP socket")
	}
	return local, tcpAddr(to), nil
}

func tcpAddr(sa unix.Sockaddr) net.Addr {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return &net.TCPAddr{IP: sa.Addr[:], Port: sa.Port}
	case *unix.SockaddrInet6:
		return &net.TCPAddr{IP: sa.Addr[:], Port: sa.Port}
	}
	return nil
}
