// Package push gives finished values to those whom they concern, through one xDS server: the whole mesh's addresses and
// policies to node proxies, and to each waypoint its own configuration. Who a client is decides what it gets.
package push

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/wire"
	"github.com/fairlead-mesh/fairlead/internal/xds"
	"github.com/fairlead-mesh/fairlead/istiod-lite/translate"
)

// meshScope is the scope of what is the same for all node proxies.
const meshScope = "mesh"

// coalesce is short: the pipeline has gathered changes already.
const coalesce = 2 * time.Millisecond

// Pusher fills an xDS server.
type Pusher struct {
	server       *xds.Server
	nodeAccounts []string
	log          *zap.Logger
}

// New makes a Pusher and the server it fills. nodeAccounts are the "<namespace>/<service account>" of node proxies.
func New(nodeAccounts []string, log *zap.Logger) *Pusher {
	p := &Pusher{nodeAccounts: nodeAccounts, log: log}
	p.server = xds.NewServer(xds.ServerConfig{
		Scope: p.scope, Coalesce: coalesce, Log: log,
		Order: []string{
			wire.AuthorizationType, wire.AddressType,
			translate.ClusterType, translate.EndpointType, translate.RouteType, translate.ListenerType,
		},
	})
	return p
}

// Server is the xDS server, to be registered at gRPC servers.
func (p *Pusher) Server() *xds.Server { return p.server }

// Authorizations pushes policies, by their key, to node proxies.
func (p *Pusher) Authorizations(updated map[string]*mesh.Authorization, removed []string) {
	resources := make([]xds.Resource, 0, len(updated))
	for key, a := range updated {
		r, err := xds.NewResource(key, wire.EncodeAuthorization(a))
		if err != nil {
			p.log.Error("encode policy; what was pushed before stays", zap.String("policy", key), zap.Error(err))
			continue
		}
		resources = append(resources, r)
	}
	p.server.Update(wire.AuthorizationType, meshScope, resources, removed)
}

// Addresses pushes workloads, by their uid, and services to node proxies.
func (p *Pusher) Addresses(workloads map[string]*mesh.Workload, gone []string,
	services map[mesh.NamespacedHostname]*mesh.Service, goneServices []mesh.NamespacedHostname) {
	resources := make([]xds.Resource, 0, len(workloads)+len(services))
	for uid, w := range workloads {
		r, err := xds.NewResource(uid, wire.EncodeWorkload(w), wire.Aliases(w, nil)...)
		if err != nil {
			p.log.Error("encode workload; what was pushed before stays", zap.String("workload", uid), zap.Error(err))
			continue
		}
		resources = append(resources, r)
	}
	for key, s := range services {
		r, err := xds.NewResource(key.String(), wire.EncodeService(s), wire.Aliases(nil, s)...)
		if err != nil {
			p.log.Error("encode service; what was pushed before stays", zap.Stringer("service", key), zap.Error(err))
			continue
		}
		resources = append(resources, r)
	}
	removed := slices.Clone(gone)
	for _, key := range goneServices {
		removed = append(removed, key.String())
	}
	p.server.Update(wire.AddressType, meshScope, resources, removed)
}

// Waypoint pushes a waypoint's configuration to its proxies: by type URL, then by resource name.
func (p *Pusher) Waypoint(waypoint types.NamespacedName, config map[string]map[string]*anypb.Any) {
	for typeURL, bodies := range config {
		resources := make([]xds.Resource, 0, len(bodies))
		for name, body := range bodies {
			resources = append(resources, xds.Resource{Name: name, Body: body})
		}
		p.server.Set(typeURL, waypoint.String(), resources)
	}
}

// DropWaypoint forgets a waypoint that is no more.
func (p *Pusher) DropWaypoint(waypoint types.NamespacedName) { p.server.Drop(waypoint.String()) }

// scope says which collection a client is given: node proxies the mesh's, a waypoint that of the Gateway whose service
// account it runs as, and nobody another's.
func (p *Pusher) scope(ctx context.Context, node *core.Node, typeURL string) (string, error) {
	caller, ok := callerOf(ctx)
	if !ok {
		return "", status.Error(codes.Unauthenticated, "the caller could not be authenticated")
	}
	own := types.NamespacedName{Namespace: caller.Identity.Namespace, Name: caller.Identity.ServiceAccount}
	nodeProxy := slices.Contains(p.nodeAccounts, own.String())
	switch typeURL {
	case wire.AddressType, wire.AuthorizationType:
		if !nodeProxy {
			return "", fmt.Errorf("%s is not a node proxy's account", own)
		}
		return meshScope, nil
	case translate.ClusterType, translate.EndpointType, translate.RouteType, translate.ListenerType:
		return own.String(), nil
	default:
		return "", errors.New("nothing of this type is served")
	}
}

// callerKey is the context key of the authenticated caller of a stream.
type callerKey struct{}

func callerOf(ctx context.Context) (identity.Caller, bool) {
	caller, ok := ctx.Value(callerKey{}).(identity.Caller)
	return caller, ok
}

// Authenticated refuses streams whose caller is not known, and hands the caller on to the scope.
func Authenticated(a identity.Authenticator, log *zap.Logger) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		caller, err := a.Authenticate(stream.Context())
		if err != nil {
			log.Warn("stream from nobody known", zap.String("method", info.FullMethod), zap.Error(err))
			return status.Error(codes.Unauthenticated, "the caller could not be authenticated")
		}
		return handler(srv, &authenticatedStream{ServerStream: stream, ctx: context.WithValue(stream.Context(), callerKey{}, caller)})
	}
}

// authenticatedStream is a stream with the caller in its context.
type authenticatedStream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context has the caller.
func (s *authenticatedStream) Context() context.Context { return s.ctx }
