package zds

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/api/zds"
)

// The times between two attempts to reach the agent. They are short: no pod of the node can start meanwhile.
const (
	firstRetry = 50 * time.Millisecond
	lastRetry  = 2 * time.Second
)

// Handler is what the proxy does about its node's pods. Calls come one after another.
type Handler interface {
	// Add takes a pod, or its current description, and owns w.Netns. Its error is the answer that the agent gets.
	Add(ctx context.Context, w Workload) error
	// Delete forgets a pod; one that is not there is no error.
	Delete(uid string) error
	// Snapshot says that named are all pods of the node: others are gone.
	Snapshot(named map[string]struct{})
}

// Client is the proxy's end.
type Client struct {
	Socket  string
	Handler Handler
	Log     *zap.Logger
}

// Run keeps connected to the agent until ctx ends, and returns ctx's error. The pods stay while the agent is away.
func (c *Client) Run(ctx context.Context) error {
	retry := firstRetry
	for {
		greeted, err := c.session(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if greeted {
			retry = firstRetry
		}
		c.Log.Info("no connection to the CNI agent, trying again", zap.Duration("in", retry), zap.Error(err))
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(retry):
		}
		retry = min(2*retry, lastRetry)
	}
}

// session is one connection; greeted tells whether the agent said anything.
func (c *Client) session(ctx context.Context) (greeted bool, err error) {
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: c.Socket, Net: "unixpacket"})
	if err != nil {
		return false, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := send(conn, &zds.ZdsHello{Version: zds.Version_V1}, -1); err != nil {
		return false, err
	}
	named := map[string]struct{}{}
	for {
		var request zds.WorkloadRequest
		files, err := receive(conn, &request)
		if err != nil {
			return greeted, err
		}
		greeted = true
		var ack zds.Ack
		if err := c.answer(ctx, &request, files, named); err != nil {
			ack.Error = err.Error()
		}
		response := &zds.WorkloadResponse{Payload: &zds.WorkloadResponse_Ack{Ack: &ack}}
		if err := send(conn, response, -1); err != nil {
			return greeted, err
		}
	}
}

// answer carries one request out. It owns files.
func (c *Client) answer(ctx context.Context, r *zds.WorkloadRequest, files []*os.File, named map[string]struct{}) error {
	if add := r.GetAdd(); add != nil {
		if len(files) != 1 {
			closeAll(files)
			return fmt.Errorf("add workload %q: %d file descriptors came with it, want its network namespace", add.GetUid(), len(files))
		}
		named[add.GetUid()] = struct{}{}
		info := add.GetWorkloadInfo()
		return c.Handler.Add(ctx, Workload{
			UID: add.GetUid(), Name: info.GetName(), Namespace: info.GetNamespace(),
			ServiceAccount: info.GetServiceAccount(), Netns: files[0],
		})
	}
	closeAll(files)
	switch {
	case r.GetKeep() != nil:
		named[r.GetKeep().GetUid()] = struct{}{}
		return nil
	case r.GetDel() != nil:
		delete(named, r.GetDel().GetUid())
		return c.Handler.Delete(r.GetDel().GetUid())
	case r.GetSnapshotSent() != nil:
		c.Handler.Snapshot(named)
		return nil
	}
	return errors.New("request of a kind that this proxy does not know")
}
