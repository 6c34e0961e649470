package push

import (
	"context"
	"errors"
	"testing"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/wire"
	"github.com/fairlead-mesh/fairlead/istiod-lite/translate"
)

func caller(namespace, account string) identity.Caller {
	return identity.Caller{Identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: namespace, ServiceAccount: account}}
}

func TestScopeFollowsTheCaller(t *testing.T) {
	p := New([]string{"istio-system/ztunnel"}, zap.NewNop())
	for _, tt := range []struct {
		name, typeURL string
		caller        identity.Caller
		want          string
		refused       bool
	}{
		{name: "node proxy", typeURL: wire.AddressType, caller: caller("istio-system", "ztunnel"), want: "mesh"},
		{name: "node proxy, policies", typeURL: wire.AuthorizationType, caller: caller("istio-system", "ztunnel"), want: "mesh"},
		{name: "waypoint", typeURL: translate.ListenerType, caller: caller("shop", "waypoint"), want: "shop/waypoint"},
		{name: "waypoint wants the mesh", typeURL: wire.AddressType, caller: caller("shop", "waypoint"), refused: true},
		{name: "ztunnel of another namespace", typeURL: wire.AddressType, caller: caller("shop", "ztunnel"), refused: true},
		{name: "type of nobody", typeURL: "type.googleapis.com/x", caller: caller("istio-system", "ztunnel"), refused: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx := context.WithValue(context.Background(), callerKey{}, tt.caller)
			got, err := p.scope(ctx, nil, tt.typeURL)
			if got != tt.want || (err != nil) != tt.refused {
				t.Errorf("got %q, %v; want %q, refused %t", got, err, tt.want, tt.refused)
			}
		})
	}
	if _, err := p.scope(context.Background(), nil, wire.AddressType); status.Code(err) != codes.Unauthenticated {
		t.Errorf("without a caller: %v", err)
	}
}

// known authenticates everybody as one caller, or nobody.
type known struct {
	caller identity.Caller
	err    error
}

func (k known) Authenticate(context.Context) (identity.Caller, error) { return k.caller, k.err }

type stream struct{ grpc.ServerStream }

func (stream) Context() context.Context { return context.Background() }

func TestAuthenticated(t *testing.T) {
	var got identity.Caller
	handler := func(_ any, s grpc.ServerStream) error {
		got, _ = callerOf(s.Context())
		return nil
	}
	info := &grpc.StreamServerInfo{}
	if err := Authenticated(known{caller: caller("a", "b")}, zap.NewNop())(nil, stream{}, info, handler); err != nil || got != caller("a", "b") {
		t.Errorf("got %+v, %v", got, err)
	}
	got = identity.Caller{}
	err := Authenticated(known{err: errors.New("no token")}, zap.NewNop())(nil, stream{}, info, handler)
	if status.Code(err) != codes.Unauthenticated || got != (identity.Caller{}) {
		t.Errorf("nobody: got %+v, %v", got, err)
	}
}
