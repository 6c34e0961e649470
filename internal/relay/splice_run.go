package relay

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// run carries both directions, each in a goroutine.
func (h *Handle) run(done func(Result)) {
	var wg sync.WaitGroup
	var up, down error
	wg.Go(func() { up = h.carry(h.b, h.a, &h.sent) })
	wg.Go(func() { down = h.carry(h.a, h.b, &h.received) })
	wg.Wait()
	h.a.Close()
	h.b.Close()
	res := Result{Err: errors.Join(up, down)}
	res.Sent, res.Received = h.Counters()
	if h.cut.Load() {
		res.Err = h.err
	}
	res.Reset = res.Err != nil
	done(res)
}

// carry copies from src until its end, which it passes on as half close; an error resets both connections.
// chunk bounds one splice, so that the counter moves while the connection lives.
func (h *Handle) carry(dst, src *net.TCPConn, count *atomic.Int64) error {
	const chunk = 1 << 20
	for {
		// Given a *LimitedReader, TCPConn.ReadFrom splices in the kernel.
		n, err := dst.ReadFrom(&io.LimitedReader{R: src, N: chunk})
		count.Add(n)
		if err != nil {
			h.reset()
			return err
		}
		if n < chunk {
			_ = dst.CloseWrite() // fails when the other direction has reset the connection, which is reported there
			return nil
		}
	}
}

// reset closes both connections so that their other ends see a RST.
func (h *Handle) reset() {
	for _, c := range []*net.TCPConn{h.a, h.b} {
		_ = c.SetLinger(0) // fails only on a socket that is closed already
		c.Close()
	}
}
