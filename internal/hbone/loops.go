package hbone

import (
	"context"
	"crypto/fips140"
	"crypto/tls"
	"net"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/loop"
	"github.com/fairlead-mesh/fairlead/internal/tlsrecord"
)

const (
	readSize  = 256 << 10 // one read of a tunnel's socket
	sendSize  = 256 << 10 // application bytes in one send of a tunnel
	ctlSize   = 48 << 10  // room that application bytes leave to control frames
	maxPinned = 32        // read buffers that slow applications may keep from being used again, per loop
	freeList  = 8         // buffers of each kind that a loop keeps for reuse
	bulkSpare = 2         // records of a tunnel's buffer that applications which send much leave to the others
	fullRead  = 64 << 10  // a tunnel of which one read gave so much has to wait for its turn
	bulkTurn  = 256 << 10 // bytes of those that have to wait that one turn carries, or a little more
)

// recordSize is a full record with its header and tail, in bytes.
const recordSize = tlsrecord.HeaderLen + tlsrecord.MaxPlain + tlsrecord.TailLen

// Loops is the driver of event loops: a tunnel and the application sockets relayed over it belong to one of n loops, which
// does their records, frames and system calls without a goroutine or a lock per connection. n = 0 means one per two
// cores. Tunnels whose connection is not a *net.TCPConn are given to Goroutines, and all of them where only approved
// cryptography may be used (GODEBUG=fips140=only), since there the records must be crypto/tls's own.
func Loops(n int) (*LoopDriver, error) {
	if n == 0 {
		n = max(1, runtime.GOMAXPROCS(0)/2)
	}
	d := &LoopDriver{handshakes: make(gate, max(1, runtime.GOMAXPROCS(0)-n))}
	for range n {
		w := &worker{start: time.Now()}
		l, err := loop.New(w.turn)
		if err != nil {
			d.Stop()
			return nil, err
		}
		w.loop = l
		d.workers = append(d.workers, w)
	}
	return d, nil
}

// LoopDriver is a set of event loops.
type LoopDriver struct {
	slow       goroutines // for what the loops cannot serve
	handshakes gate
	workers    []*worker
	next       atomic.Uint32
}

// Stop ends the loops. Close the pools and servers that use them before.
func (d *LoopDriver) Stop() {
	for _, w := range d.workers {
		w.loop.Stop()
	}
}

func (d *LoopDriver) start(ctx context.Context, nc net.Conn, cfg *tls.Config, tc tunnelConfig) (tunnel, error) {
	tcp, ok := nc.(*net.TCPConn)
	if !ok || fips140.Enforced() {
		return d.slow.start(ctx, nc, cfg, tc)
	}
	d.handshakes.enter()
	rec, state, early, err := tlsrecord.Handshake(ctx, gatedConn{tcp, d.handshakes}, d.handshakes.config(cfg), tc.server)
	d.handshakes.leave()
	if err == nil {
		err = checkState(state)
	}
	if err != nil {
		tcp.Close()
		return nil, &TLSError{Err: err}
	}
	info := &connInfo{local: tcp.LocalAddr(), remote: tcp.RemoteAddr(), tls: state}
	fd, err := loop.Detach(tcp)
	if err != nil {
		tcp.Close()
		return nil, &TunnelError{Err: err}
	}
	w := d.workers[d.next.Add(1)%uint32(len(d.workers))]
	t := newLoopTunnel(w, fd, rec, info, tc)
	t.tail = early
	w.loop.Post(t.register)
	return t, nil
}

// worker is one loop with what its tunnels share: buffers, and the lists of who has work in this turn.
type worker struct {
	loop  *loop.Loop
	start time.Time
	now   time.Duration // since start, at the beginning of the turn

	readTunnels, spareTunnels []*loopTunnel // may have a little to read
	readApps, spareApps       []*loopApp    // may have a little to read, and their tunnel takes it
	bulk                      bulkQueue     // who reads or writes much: one after the other, a few in a turn
	fed                       []*loopApp    // got DATA of the read buffer in use
	dirty                     []*loopTunnel // have output

	in      *readBuf
	inFree  []*readBuf
	pinned  int
	outFree [][]byte
	iov     [64]unix.Iovec
}

// readBuf is a buffer that tunnels are read into. DATA that an application does not take at once stays in it.
type readBuf struct {
	b    []byte
	refs int
}

// bulkQueue is who has much to carry, in the order of their turns.
type bulkQueue struct {
	waiting []bulkCarrier
	next    int
}

// bulkCarrier is a tunnel or an application's socket that has much to carry. share carries one share of it and says how
// many bytes that were; what has more after that queues again.
type bulkCarrier interface{ share() int }

func (q *bulkQueue) push(b bulkCarrier) { q.waiting = append(q.waiting, b) }

func (q *bulkQueue) empty() bool { return q.next == len(q.waiting) }

func (q *bulkQueue) pop() bulkCarrier {
	b := q.waiting[q.next]
	q.waiting[q.next] = nil
	if q.next++; q.empty() {
		q.waiting, q.next = q.waiting[:0], 0
	} else if q.next >= 1024 { // it may never be empty
		rest := copy(q.waiting, q.waiting[q.next:])
		clear(q.waiting[rest:])
		q.waiting, q.next = q.waiting[:rest], 0
	}
	return b
}

// turn is one round over what is ready: tunnels are read and their DATA written to the applications, applications are
// read into their tunnels' records, and each tunnel with output is sent once. Who has little to carry is served at once;
// those who have much take turns, of which only so many fit in one round that new arrivals do not wait for long.
func (w *worker) turn() (more bool) {
	w.now = time.Since(w.start)
	ts := w.readTunnels
	w.readTunnels = w.spareTunnels[:0]
	for i, t := range ts {
		ts[i] = nil
		t.reading = false
		t.read()
	}
	w.spareTunnels = ts
	as := w.readApps
	w.readApps = w.spareApps[:0]
	for i, a := range as {
		as[i] = nil
		a.reading = false
		a.read()
	}
	w.spareApps = as
	for left := bulkTurn; left > 0 && !w.bulk.empty(); {
		left -= w.bulk.pop().share()
	}
	w.flush()
	return len(w.readTunnels)+len(w.readApps) > 0 || !w.bulk.empty()
}

// flush sends what the tunnels have.
func (w *worker) flush() {
	for len(w.dirty) > 0 {
		ds := w.dirty
		w.dirty = nil
		for _, t := range ds {
			t.dirty = false
			t.flush()
		}
		if w.dirty == nil {
			clear(ds)
			w.dirty = ds[:0]
		}
	}
}

func (w *worker) buffer() *readBuf {
	if w.in == nil {
		if n := len(w.inFree); n > 0 {
			w.in = w.inFree[n-1]
			w.inFree = w.inFree[:n-1]
		} else {
			w.in = &readBuf{b: make([]byte, readSize+tlsrecord.HeaderLen+tlsrecord.MaxPlain+256)}
		}
	}
	return w.in
}

// unpin gives up one reference to r.
func (w *worker) unpin(r *readBuf) {
	if r == nil {
		return
	}
	if r.refs--; r.refs == 0 && r != w.in {
		w.pinned--
		if len(w.inFree) < freeList {
			w.inFree = append(w.inFree, r)
		}
	}
}

// retire sets the read buffer aside when applications hold parts of it.
func (w *worker) retire() {
	if w.in.refs > 0 {
		w.pinned++
		w.in = nil
	}
}

// sendBuffer is a buffer for a tunnel's records.
func (w *worker) sendBuffer() []byte {
	if n := len(w.outFree); n > 0 {
		b := w.outFree[n-1]
		w.outFree = w.outFree[:n-1]
		return b
	}
	const records = sendSize/tlsrecord.MaxPlain + 1 + bulkSpare
	return make([]byte, records*recordSize+ctlSize)
}

func (w *worker) freeSendBuffer(b []byte) {
	if len(w.outFree) < freeList {
		w.outFree = append(w.outFree, b)
	}
}
